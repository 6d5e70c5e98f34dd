"""The rules of the lint by name, and how a finding reads: `PATH: what is wrong [rule]`, with a hint."""

from __future__ import annotations

from qlora_export.errors import ExitCode, Problem

RULES = {
    "adapter-left": "Merged weights hold no adapter tensor, and an adapter lies only where its format keeps one.",
    "base-path": "An adapter names its base by a Hub id or a folder of the repository, not by a machine's path.",
    "code": "No file with code is published, and no configuration names code to load.",
    "companion": "A model has its configuration, and the tokenizer files that belong together.",
    "config": "config.json describes the tensors: their quantisation, its parameters and the dtype of what is dense.",
    "external-data": "ONNX external data lies beside its graph, is as large as the graph says, and all of it is used.",
    "foreign-file": "Every file is listed and comes from a manifest or the publisher; every listed file is there.",
    "header": "A safetensors header is valid: at most 100 MB, tensors tile the file without holes or overlaps.",
    "hostile-path": "A path is relative and plain, names a regular file, and is unique whatever the case.",
    "index": "Index and shards agree both ways, no tensor lies in two shards, no shard is missing, the total is right.",
    "licence": "A licence is stated, and it is not more permissive than the base's.",
    "non-finite": "No weight, scale or bias is NaN or infinite.",
    "onnx": "An ONNX graph can be read; without the onnx package it cannot be checked.",
    "pickle": "No file is a pickle or can hold one, by its name or by its first bytes.",
    "secret": "No file holds a token or a private key.",
    "tied-weights": "tie_word_embeddings agrees with the bytes of embedding and output head.",
    "unpinned-base": "The base is known by the digests of its files or by a commit, an adapter by its digest.",
    "vocabulary": "vocab_size is the number of rows of the embedding and of the output head.",
}


def finding(rule: str, path: str, what: str, hint: str, code: ExitCode = ExitCode.REFUSED) -> Problem:
    """What a rule found in a file of the repository; `path` is printed so that it cannot mislead."""
    if rule not in RULES:
        raise KeyError(rule)
    return Problem(code, f"{shown(path)}: {what} [{rule}]", hint)


def shown(path: str) -> str:
    """A path as it can be printed on one line, without characters that hide or reorder others."""
    return path if path.isprintable() else ascii(path)[1:-1]
