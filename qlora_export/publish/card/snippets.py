"""How to load an artifact: code that runs as it stands, for its format and its place in the repository.

transformers finds a sub-folder by `subfolder`, peft too; ONNX Runtime GenAI opens a folder, so that one is downloaded.
transformers.js looks for configuration and tokenizer at the root of a repository alone. What is generated is shown by
the chat template where one is shipped.
"""

from __future__ import annotations

from qlora_export.publish.card.facts import CardFacts, CardItem
from qlora_export.publish.card.rendering import render

JAVASCRIPT_LAYOUT = "transformers.js"


def snippet(facts: CardFacts, item: CardItem) -> str:
    """The Python code that loads and tries one artifact."""
    if item.info.library == "onnx":
        library = "onnxruntime" if item.is_classifier else "onnxruntime_genai"
    elif item.has_zero_points:
        library = "vllm"
    else:
        library = "adapter" if item.info.base_model_relation == "adapter" else "transformers"
    return render(f"snippets/{library}.py.txt", facts=facts, item=item)


def javascript(facts: CardFacts, item: CardItem) -> str | None:
    """The code that loads and tries an artifact in a browser or in Node; None where that does not open it."""
    if not loads_in_javascript(item):
        return None
    return render(f"snippets/{'classify' if item.is_classifier else 'generate'}.js.txt", facts=facts, item=item)


def loads_in_javascript(item: CardItem) -> bool:
    """Whether transformers.js finds everything where it looks."""
    stated = item.manifest.get("exporter", {}).get("options", {}).get("layout")
    return stated == JAVASCRIPT_LAYOUT and not item.prefix


def served(facts: CardFacts, item: CardItem) -> str | None:
    """The command that serves an artifact with vLLM; None where that does not open it as it is."""
    if not item.info.served_by_vllm or item.prefix or item.is_classifier:
        return None
    return f"vllm serve {facts.repository}"
