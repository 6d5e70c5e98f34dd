// What a user of transformers.js does with a folder: tokenizer, chat template, model, greedy generation.
export async function generate({ AutoModelForCausalLM, AutoTokenizer }, { name, device, prompts, count }) {
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const model = await AutoModelForCausalLM.from_pretrained(name, { device });
  const answers = [];
  for (const content of prompts) {
    const options = { add_generation_prompt: true, return_dict: true };
    const inputs = tokenizer.apply_chat_template([{ role: 'user', content }], options);
    const found = await model.generate({ ...inputs, max_new_tokens: count, do_sample: false });
    answers.push(Array.from(found.data, Number));
  }
  return answers;
}
