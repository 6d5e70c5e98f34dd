// Reads {folder, name, device, prompts, count} on stdin; prints the token ids of each prompt and its continuation.
import { readFileSync } from 'node:fs';
import * as transformers from '@huggingface/transformers';
import { generate } from './generate.mjs';

const asked = JSON.parse(readFileSync(0, 'utf8'));
transformers.env.allowRemoteModels = false;
transformers.env.localModelPath = asked.folder;
process.stdout.write(JSON.stringify(await generate(transformers, asked)));
