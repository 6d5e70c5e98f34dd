"""How to load an artifact: Python that runs as it stands, for its format and its place in the repository.

transformers finds a sub-folder by `subfolder`, peft too; ONNX Runtime GenAI opens a folder, so that one is downloaded.
What is generated is shown by the chat template where one is shipped.
"""

from __future__ import annotations

import json
from typing import Any

from qlora_export.publish.card.facts import CardFacts, CardItem
from qlora_export.recipe.config import parse_training

GREETING = "Hello"
NEW_TOKENS = 64
ADAPTER_FOLDER = "adapter"


def snippet(facts: CardFacts, item: CardItem) -> str:
    """The Python code that loads and tries one artifact."""
    if item.info.library == "onnx":
        return _label_graph(facts, item) if item.is_classifier else _genai(facts, item)
    if item.has_zero_points:
        return _vllm(facts, item)
    if item.info.base_model_relation == "adapter":
        return _adapter_alone(facts, item)
    return _transformers(facts, item)


def served(facts: CardFacts, item: CardItem) -> str | None:
    """The command that serves an artifact with vLLM; None where that does not open it as it is."""
    if not item.info.served_by_vllm or item.prefix or item.is_classifier:
        return None
    return f"vllm serve {facts.repository}"


def _transformers(facts: CardFacts, item: CardItem) -> str:
    beside = item.info.library == "peft"
    where = _arguments(facts.repository, subfolder=item.subfolder)
    lines = [
        *(["from peft import PeftModel"] if beside else []),
        f"from transformers import {_model_class(item)}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({where})",
        f'model = {_model_class(item)}.from_pretrained({where}, dtype="auto", device_map="auto")',
    ]
    if beside:
        folder = f"{item.prefix}{ADAPTER_FOLDER}"
        lines.append(f"model = PeftModel.from_pretrained(model, {_arguments(facts.repository, subfolder=folder)})")
    return "\n".join([*lines, *_trial(item)])


def _adapter_alone(facts: CardFacts, item: CardItem) -> str:
    """The base as in training, the adapter on it."""
    base = _arguments(facts.base_id, revision=facts.base_commit)
    shipped = _arguments(facts.repository, subfolder=item.subfolder)
    training = _training(facts, item)
    lines = [
        *(["import torch"] if training else []),
        "from peft import PeftModel",
        f"from transformers import {_model_class(item)}, AutoTokenizer{', BitsAndBytesConfig' if training else ''}",
        "",
        *training,
        f"tokenizer = AutoTokenizer.from_pretrained({shipped if 'tokenizer_config.json' in item.files else base})",
        f"model = {_model_class(item)}.from_pretrained(",
        *(f"    {argument}," for argument in _base_arguments(item, base, training)),
        ")",
        f"model = PeftModel.from_pretrained(model, {shipped})",
    ]
    return "\n".join([*lines, *_trial(item)])


def _base_arguments(item: CardItem, base: str, training: list[str]) -> list[str]:
    if not training:
        return [base, 'dtype="auto"', 'device_map="auto"']
    stored = item.manifest["training_quantization"]["storage_dtype"]
    return [base, "quantization_config=quantization", f"dtype=torch.{stored}", 'device_map="auto"']


def _training(facts: CardFacts, item: CardItem) -> list[str]:
    """The quantisation of training as code; nothing for a base that was not quantised while it was loaded."""
    training: dict[str, Any] = item.manifest.get("training_quantization") or {}
    if training.get("quant_type") not in ("nf4", "fp4") or training.get("provenance") == "base":
        return []
    stated = facts.recipe.get("training_quantization") if training["provenance"] == "stated" else None
    skipped = list(parse_training(stated).skip) if stated else []
    return [
        "quantization = BitsAndBytesConfig(",
        "    load_in_4bit=True,",
        f'    bnb_4bit_quant_type="{training["quant_type"]}",',
        f"    bnb_4bit_use_double_quant={training['double_quant']},",
        f"    bnb_4bit_compute_dtype=torch.{training['compute_dtype']},",
        *([f"    llm_int8_skip_modules={json.dumps(skipped)},"] if skipped else []),
        ")",
    ]


def _trial(item: CardItem) -> list[str]:
    """What shows that the model answers."""
    if item.is_classifier:
        return [
            "",
            f'inputs = tokenizer("{GREETING}", return_tensors="pt").to(model.device)',
            "print(model(**inputs).logits.softmax(-1))",
        ]
    lines = ["", f'inputs = tokenizer("{GREETING}", return_tensors="pt").to(model.device)']
    if item.chats:
        lines = [
            "",
            f'messages = [{{"role": "user", "content": "{GREETING}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
        ]
    return [
        *lines,
        f"output = model.generate(**inputs, max_new_tokens={NEW_TOKENS})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _vllm(facts: CardFacts, item: CardItem) -> str:
    place = f'"{facts.repository}"'
    lines = ["from vllm import LLM, SamplingParams", ""]
    if item.prefix:
        lines = ["from huggingface_hub import snapshot_download", *lines]
        lines.append(f'folder = snapshot_download("{facts.repository}", allow_patterns="{item.prefix}*")')
        place = f'f"{{folder}}/{item.subfolder}"'
    asked = f'model.generate("{GREETING}", settings)'
    if item.chats:
        asked = f'model.chat([{{"role": "user", "content": "{GREETING}"}}], settings)'
    return "\n".join(
        [
            *lines,
            f"model = LLM({place})",
            f"settings = SamplingParams(max_tokens={NEW_TOKENS})",
            f"print({asked}[0].outputs[0].text)",
        ]
    )


def _label_graph(facts: CardFacts, item: CardItem) -> str:
    """A sequence classifier's graph, with its tokenizer, by their own libraries."""
    part = f', allow_patterns="{item.prefix}*"' if item.prefix else ""
    graph = next((name for name in sorted(item.files) if name.endswith(".onnx")), "model.onnx")
    return "\n".join(
        [
            "import json",
            "from pathlib import Path",
            "",
            "import numpy",
            "import onnxruntime",
            "from huggingface_hub import snapshot_download",
            "from tokenizers import Tokenizer",
            "",
            f'folder = snapshot_download("{facts.repository}"{part})',
            f'tokenizer = Tokenizer.from_file(f"{{folder}}/{item.prefix}tokenizer.json")',
            f'session = onnxruntime.InferenceSession(f"{{folder}}/{item.prefix}{graph}")',
            f'labels = json.loads(Path(folder, "{item.prefix}config.json").read_text())["id2label"]',
            "",
            f'tokens = numpy.array([tokenizer.encode("{GREETING}").ids])',
            '(logits,) = session.run(["logits"], {"input_ids": tokens, "attention_mask": numpy.ones_like(tokens)})',
            "print(labels[str(logits[0].argmax())])",
        ]
    )


def _genai(facts: CardFacts, item: CardItem) -> str:
    part = f', allow_patterns="{item.prefix}*"' if item.prefix else ""
    folder = f'f"{{folder}}/{item.subfolder}"' if item.prefix else "folder"
    prompt = [f'prompt = "{GREETING}"']
    if item.chats:
        prompt = [
            f'messages = [{{"role": "user", "content": "{GREETING}"}}]',
            "prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)",
        ]
    return "\n".join(
        [
            *(["import json", ""] if item.chats else []),
            "import onnxruntime_genai",
            "from huggingface_hub import snapshot_download",
            "",
            f'folder = snapshot_download("{facts.repository}"{part})',
            f"model = onnxruntime_genai.Model({folder})",
            "tokenizer = onnxruntime_genai.Tokenizer(model)",
            "",
            *prompt,
            "tokens = tokenizer.encode(prompt)",
            "parameters = onnxruntime_genai.GeneratorParams(model)",
            f"parameters.set_search_options(max_length=len(tokens) + {NEW_TOKENS})",
            "generator = onnxruntime_genai.Generator(model, parameters)",
            "generator.append_tokens(tokens)",
            "while not generator.is_done():",
            "    generator.generate_next_token()",
            "print(tokenizer.decode(generator.get_sequence(0)[len(tokens) :]))",
        ]
    )


def _model_class(item: CardItem) -> str:
    return "AutoModelForSequenceClassification" if item.is_classifier else "AutoModelForCausalLM"


def _arguments(repository: str, **named: str | None) -> str:
    """A repository and where to look in it, as arguments."""
    return ", ".join([f'"{repository}"', *(f'{name}="{value}"' for name, value in named.items() if value)])
