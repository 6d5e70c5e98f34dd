"""How to load an artifact in JavaScript, where its folder has the layout of transformers.js.

transformers.js looks for configuration and tokenizer at the root of a repository: there is no snippet for an artifact
in a folder of its own.
"""

from __future__ import annotations

from qlora_export.publish.card.facts import CardFacts, CardItem
from qlora_export.publish.card.snippets import GREETING, NEW_TOKENS

LAYOUT = "transformers.js"


def loads_in_javascript(item: CardItem) -> bool:
    """Whether transformers.js finds everything where it looks."""
    stated = item.manifest.get("exporter", {}).get("options", {}).get("layout")
    return stated == LAYOUT and not item.prefix


def javascript(facts: CardFacts, item: CardItem) -> str | None:
    """The code that loads and tries an artifact in a browser or in Node; None where that does not open it."""
    if not loads_in_javascript(item):
        return None
    if item.is_classifier:
        return "\n".join(
            [
                "import { pipeline } from '@huggingface/transformers';",
                "",
                f"const classify = await pipeline('text-classification', '{facts.repository}');",
                f"console.log(await classify('{GREETING}'));",
            ]
        )
    asked = [f"const inputs = tokenizer('{GREETING}');"]
    if item.chats:
        asked = [
            f"const messages = [{{ role: 'user', content: '{GREETING}' }}];",
            "const options = { add_generation_prompt: true, return_dict: true };",
            "const inputs = tokenizer.apply_chat_template(messages, options);",
        ]
    return "\n".join(
        [
            "import { AutoModelForCausalLM, AutoTokenizer } from '@huggingface/transformers';",
            "",
            f"const tokenizer = await AutoTokenizer.from_pretrained('{facts.repository}');",
            f"const model = await AutoModelForCausalLM.from_pretrained('{facts.repository}');",
            "",
            *asked,
            f"const found = await model.generate({{ ...inputs, max_new_tokens: {NEW_TOKENS}, do_sample: false }});",
            "console.log(tokenizer.decode(Array.from(found.data, Number), { skip_special_tokens: true }));",
        ]
    )
