"""A report with every key that a page knows, made of round functions; its texts are as hostile as files can be."""

from __future__ import annotations

import math
from typing import Any

HOSTILE = "</script><script>alert(1)</script>\x00\x1b[31m\u202e\u200b\ud800\"'&"
MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
LAYERS = 12
TOKENS = 16_384
EDGES = [10 ** (-7 + place / 4) for place in range(37)]
# Name, format, bytes, natural logarithm of the median KL, verdict, expected.
ARTIFACTS = (
    ("bf16", "bf16", 2_471_000_000, -11.0, "pass", "pass"),
    ("int8", "int8", 1_502_000_000, -8.3, "pass", "pass"),
    ("nf4-nearest", "nf4", 1_012_000_000, -1.6, "fail", "fail"),
    ("nf4-dithered", "nf4", 1_012_000_000, -3.4, "inconclusive", "pass"),
    ("nf4-calibrated", "nf4", 1_012_000_000, -6.2, "pass", "pass"),
    ("gguf-q4_k_m-of-somebody", "someone's own format", 955_000_000, -4.0, "fail", "pass"),
    ("onnx-int4", "onnx-int4", 1_240_000_000, -4.4, "not-measured", "pass"),
)
# Numbers of a drift that only artifacts with layers have.
LATER = (
    "survival_median", "survival_min", "survival_min_tensor", "codes_changed_median", "weighted_survival_median",
    "weighted_survival_min", "weighted_survival_min_tensor",
)  # fmt: skip
UNCALIBRATED = dict.fromkeys(("weighted_survival", "output_error", "weighted_of"))
YARDSTICK = {"artifact": "nf4-calibrated", "mean_kl": 0.001, "perplexity_ratio": 1.002}


def full_report() -> dict[str, Any]:
    """A run with every section."""
    return {
        "schema": 1,
        "recipe_digest": None,
        "tokens": {
            "sha256": "c1" * 32,
            "count": TOKENS,
            "protocol": "chat template, windows of 2048 tokens, assistant tokens scored",
            "name": "chat",
            "window_tokens": 2048,
            "windows": 88,
            "stride_tokens": 1024,
            "begin": "the tokenizer's own first token",
            "documents": {"count": 40, "words": 12_000, "bytes": 64_000},
            "limit": None,
        },
        "reference": {
            "model": "4-bit base with live adapter",
            "runtime": "transformers",
            "activations": "float32",
            "device": "NVIDIA H100 80GB HBM3",
            "training_quantization": "sidecar",
            "perplexity": 4.2091,
            "perplexity_stderr": 0.031,
            "base": drift(0.5, 0.02),
            "merged": drift(-11.2, 1.0),
            "noise_floor": {"dtype": "bfloat16", "tokens": TOKENS, "mean_kl": 3.1e-5, "same_top1": 0.9979},
        },
        "document_perplexity": {
            "reference": {"word_perplexity": 41.2, "byte_perplexity": 1.8, "bits_per_byte": 0.85},
            "artifacts": {name: _documents(place) for place, (name, *_) in enumerate(ARTIFACTS[:-1])},
        },
        "assumptions": ["the output head is tied to the embedding, and stays so", HOSTILE],
        "artifacts": [_artifact(place, *facts) for place, facts in enumerate(ARTIFACTS)],
        "published": [
            {
                "artifact": "nf4-calibrated",
                "destination": "hub:acme/support-bot",
                "url": "https://huggingface.co/acme/support-bot",
                "revision": "v1",
                "prefix": "",
                "changed": True,
                "transport": "xet",
                "commit": "ab" * 20,
                "files": {"model.safetensors": "d4" * 32, HOSTILE: "e5" * 32},
                "proof": {"files": 9, "bytes": 10, "sample_tokens": 321, "nll": 0.5, "nll_released": 0.5},
            }
        ],
        "exit_code": 3,
    }


def drift(log_median: float, gain: float) -> dict[str, Any]:
    """The numbers of a model whose median KL has this logarithm."""
    median = math.exp(log_median)
    mean = 2.4 * median
    return {
        "perplexity": 4.2091 * math.exp(mean / 2),
        "perplexity_stderr": 0.031,
        "perplexity_reference": 4.2091,
        "perplexity_reference_stderr": 0.031,
        "ln_ppl_ratio": mean / 2,
        "ln_ppl_ratio_stderr": mean / 40,
        "mean_kl": mean,
        "mean_kl_stderr": mean / 50,
        "median_kl": median,
        "kl_99": 18 * median,
        "same_top1": max(1 - math.sqrt(mean) / 3, 0.02),
        "same_top1_stderr": math.sqrt(mean) / 200,
        "gain_kept": gain,
        "gain_kept_stderr": 0.002,
        **dict.fromkeys(LATER),
    }


def _artifact(
    place: int, name: str, form: str, stored: int, log_median: float, verdict: str, expected: str
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": name,
        "format": form,
        "path": f"/runs/7/out/{name}",
        "bytes": stored,
        "runtime": "transformers",
        "manifest_sha256": f"{place:02x}" * 32,
        "reused": place == 1,
        "verdict": verdict,
        "reasons": _reasons(verdict),
    }
    if verdict == "not-measured":
        return {**facts, "drift": None}
    layers = _layers(math.exp(log_median), "calibrated" in name)
    lowest = min(layers, key=lambda layer: layer["survival"])
    numbers = drift(log_median, 1 - math.exp(log_median))
    numbers |= {"survival_min": lowest["survival"], "survival_min_tensor": lowest["tensor"]}
    if "calibrated" in name:
        numbers["weighted_survival_min"] = 0.993
        facts["calibration"] = _calibration()
    if name == "nf4-dithered":
        further = {"mean_kl": 0.07, "mean_kl_stderr": 0.001, "ln_ppl_ratio": 0.04, "ln_ppl_ratio_stderr": 0.001}
        facts["beside"] = {"artifact": YARDSTICK["artifact"], **further}
    return {
        **facts,
        "expected": expected,
        "limits": {
            "perplexity_ratio": 1.03,
            "mean_kl": 0.05,
            "same_top1": 0.95,
            "gain_kept": None,
            "survival_min": 0.9,
            "no_worse_than": YARDSTICK if name == "nf4-dithered" else None,
        },
        "drift": numbers,
        "survival": {layer["tensor"]: layer["survival"] for layer in layers},
        "layers": layers,
        "distribution": _distribution(log_median),
        "worst": _worst(log_median),
        "generation": _generation(place),
        "choices": _choices(place),
        "trace": _trace(place, math.exp(log_median)),
    }


def _documents(place: int) -> dict[str, float]:
    return {"word_perplexity": 41.2 + place, "byte_perplexity": 1.8 + place / 10, "bits_per_byte": 0.85 + place / 20}


def _reasons(verdict: str) -> list[str]:
    if verdict == "fail":
        return [
            "mean KL is 0.4847 ± 0.0097, the limit is at most 0.05",
            "lowest survival is 0.337 in model.layers.3.self_attn.k_proj.weight, the limit is at least 0.9",
        ]
    if verdict == "inconclusive":
        return ["same top-1 is 0.949 ± 0.003, the limit is at least 0.95: about 7200 more tokens are needed to decide"]
    return []


def _calibration() -> dict[str, Any]:
    facts = {"sequences": 128, "tokens": 65_536, "tokens_sha256": "77" * 32, "layers": 84}
    return {**facts, "fallbacks": {"its inputs are all zero": 2}, "notes": [f"a note that quotes {HOSTILE}"]}


def _layers(median: float, calibrated: bool) -> list[dict[str, Any]]:
    found = []
    for layer in range(LAYERS):
        for place, matrix in enumerate(MATRICES):
            wave = 0.5 + 0.5 * math.sin(1.7 * layer + 2.3 * place)
            kept = 1 - min(3 * median, 0.65) * wave
            tensor = f"model.layers.{layer}.{matrix}.weight"
            facts = {"tensor": tensor, "survival": kept, "codes_changed": 0.3 * wave, **UNCALIBRATED}
            if calibrated:
                facts |= {"weighted_survival": 1 - 0.02 * wave, "output_error": 0.01, "weighted_of": "before tuning"}
            found.append(facts)
    return found


def _distribution(log_median: float) -> dict[str, Any]:
    spread = 1.8
    cumulated = [0.5 * (1 + math.erf((math.log(edge) - log_median) / spread / math.sqrt(2))) for edge in EDGES]
    parts = [high - low for low, high in zip([0.0, *cumulated], [*cumulated, 1.0], strict=True)]
    quantiles = {"0.5": 0.0, "0.9": 1.28, "0.95": 1.64, "0.99": 2.33, "0.999": 3.09, "1": 3.9}
    median = math.exp(log_median)
    return {
        "kl_quantiles": {key: math.exp(log_median + spread * score) for key, score in quantiles.items()},
        "kl_histogram": {"edges": EDGES, "counts": [round(TOKENS * share) for share in parts]},
        "delta_p_rms": math.sqrt(median) / 6,
        "delta_p_mean": -median / 9,
        "delta_p_quantiles": {"0.001": -0.4, "0.999": 0.2},
        "confidence": [
            {
                "from": low,
                "to": high,
                "tokens": tokens,
                "mean_kl": None if tokens == 0 else median * factor,
                "mean_kl_stderr": None if tokens == 0 else median / 30,
                "same_top1": None if tokens == 0 else 1 - min(median * factor, 0.9),
            }
            for low, high, tokens, factor in (
                (0.0, 0.25, 0, 0.0), (0.25, 0.5, 2210, 5.0), (0.5, 0.75, 2801, 3.1), (0.75, 0.9, 3300, 1.9),
                (0.9, 0.99, 4012, 0.8), (0.99, 1.0, 4061, 0.1),
            )
        ],
        "nonfinite": 0,
    }  # fmt: skip


def _worst(log_median: float) -> dict[str, Any]:
    return {
        "tokens": [
            {
                "window": 3,
                "position": 17,
                "place": "line 4",
                "before": "You are the support of a shop.\nOrder 512 came broken. We are sorry. You get the money",
                "token": " back",
                "kl": math.exp(log_median + 7),
                "p_reference": 0.981,
                "p_candidate": 0.00012,
                "reference_says": " back",
                "candidate_says": " tomorrow",
            },
            {
                "window": 41,
                "position": 2,
                "place": "line 42",
                "before": HOSTILE,
                "token": "\u0301\u202etxt.exe\n",
                "kl": math.exp(log_median + 6),
                "p_reference": 0.5,
                "p_candidate": 0.04,
                "reference_says": "  ",
                "candidate_says": "\u0634\u06a9\u0631",
            },
        ],
        "windows": [
            {
                "window": 41,
                "place": "line 42",
                "tokens": 188,
                "mean_kl": math.exp(log_median + 2),
                "start": f"<b>Hello</b>, {HOSTILE}\nsecond line",
            }
        ],
    }


def _generation(place: int) -> dict[str, Any]:
    return {
        "prompts": 24,
        "tokens": 64,
        "agreement_mean": 64 / (place + 1),
        "agreement_median": 60 / (place + 1),
        "whole": 24 // (place + 1),
        "worst": [
            {
                "place": "line 2",
                "prompt": "user: Order 512 came broken.\nassistant:",
                "agreed": 3,
                "reference": "We are sorry. You get the money back within three days.",
                "candidate": None if place == 3 else f"We are not sure what you mean. {HOSTILE}",
            }
        ],
    }


def _choices(place: int) -> dict[str, Any]:
    return {
        "items": 200,
        "accuracy_reference": 0.74,
        "accuracy": 0.74 - place / 100,
        "accuracy_stderr": 0.031,
        "lost": 4 + place,
        "gained": 3,
        "p_value": 0.77 / (place + 1),
        "flipped": [
            {
                "place": "line 2",
                "question": "Which of these is returned within 30 days?",
                "answer": "Anything unused",
                "reference": "Anything unused",
                "candidate": HOSTILE,
            }
        ],
    }


def _trace(place: int, median: float) -> dict[str, Any]:
    errors = [1e-3 + math.sqrt(median) / 40 * (1 + layer / 6) for layer in range(LAYERS)]
    broken = None
    if place == 1:
        return {"layers": [], "broken": None, "note": "its runtime has none"}
    if place == 5:
        errors = [error * (30 if layer >= 7 else 1) for layer, error in enumerate(errors)]
        broken = {"name": "model.layers.7.mlp.down_proj", "error": errors[7], "usual": errors[6]}
    layers = [{"name": f"model.layers.{layer}", "error": error} for layer, error in enumerate(errors)]
    return {"layers": layers, "broken": broken}
