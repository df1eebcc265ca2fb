"""A GGUF file's vocabulary as Hugging Face's tokenizer files."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre
from tokenizers.pre_tokenizers import PreTokenizer

from services.engine.models.errors import ModelFileError
from services.engine.models.gguf import GgufFile

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = 3, 4

# The regular expressions that the models' authors published with their tokenizers.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _bytes(*, words: bool) -> PreTokenizer:
    return pre.ByteLevel(add_prefix_space=False, use_regex=words)


def _split(regex: str) -> PreTokenizer:
    return pre.Sequence([pre.Split(Regex(regex), "isolated"), _bytes(words=False)])


def _digits() -> PreTokenizer:
    return pre.Sequence([pre.Digits(individual_digits=True), _bytes(words=True)])


# tokenizer.ggml.pre -> how text is cut before byte pairs are merged.
PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "smollm": _digits,
    "starcoder": _digits,
    "gpt-2": lambda: _bytes(words=True),
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
    "deepseek-r1-qwen": lambda: _split(_QWEN2),
}
_WHOLE_WORDS = {"llama-bpe"}  # a word that is a token is not put together from merges
_COMPOSED = {"qwen2", "deepseek-r1-qwen"}  # text is brought to Unicode form NFC first


def tokenizer_json(file: GgufFile) -> Tokenizer:
    """The tokenizer. Raises ModelFileError, naming the key, for a kind that is not supported."""
    model = file.get("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise ModelFileError(
            file.path,
            f"tokenizer.ggml.model is {model!r}; only 'gpt2' (byte-level BPE) can be read",
        )
    kind = file.get("tokenizer.ggml.pre", str)
    if kind not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ModelFileError(file.path, f"tokenizer.ggml.pre is {kind!r}; known are {known}")
    tokens = tokens_of(file)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocabulary[t] != i)
        raise ModelFileError(file.path, f"tokenizer.ggml.tokens: {twice!r} occurs twice")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(file, vocabulary),
            ignore_merges=kind in _WHOLE_WORDS,
        )
    )
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[kind]()
    tokenizer.decoder = decoders.ByteLevel()
    if kind in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    _add_special(file, tokenizer, tokens)
    bos = special(file, tokens, "bos")
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", bool, kind == "llama-bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return tokenizer


def tokenizer_config(file: GgufFile) -> dict[str, object]:
    """tokenizer_config.json: the chat template and the names of special tokens."""
    tokens = tokens_of(file)
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.get("llama.context_length", int),
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = special(file, tokens, ours)
        if token is not None:
            config[f"{theirs}_token"] = token
    template = file.optional("tokenizer.chat_template", str)
    if template is not None:
        config["chat_template"] = template
    return config


def end_ids(file: GgufFile) -> list[int]:
    """Ids that end a generation: of the sequence, of a turn, of a message."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ids = [file.get(key, int) for key in keys if key in file.metadata]
    return sorted(set(ids))


def tokens_of(file: GgufFile) -> list[str]:
    """Every token, by id. Raises ModelFileError."""
    return _strings(file, "tokenizer.ggml.tokens")


def special(file: GgufFile, tokens: list[str], name: str) -> str | None:
    """The token that tokenizer.ggml.<name>_token_id says. Raises ModelFileError if out of range."""
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = file.optional(key, int)
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise ModelFileError(file.path, f"{key} is {token_id}, there are {len(tokens)} tokens")
    return tokens[token_id]


def _merges(file: GgufFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in _strings(file, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= vocabulary.keys():
            raise ModelFileError(
                file.path, f"tokenizer.ggml.merges: {merge!r} does not merge two tokens into one"
            )
        merges.append((left, right))
    return merges


def _add_special(file: GgufFile, tokenizer: Tokenizer, tokens: list[str]) -> None:
    kinds = file.get("tokenizer.ggml.token_type", list)
    if len(kinds) != len(tokens):
        raise ModelFileError(
            file.path,
            f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens",
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )


def _strings(file: GgufFile, key: str) -> list[str]:
    values = file.get(key, list)
    if not values or not isinstance(values[0], str):
        raise ModelFileError(file.path, f"metadata key {key} is not a list of strings")
    return values
