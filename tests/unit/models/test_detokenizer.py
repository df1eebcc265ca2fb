"""Text of tokens as they come is the text of them all, whatever they are and however they come."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference
from tokenizers import decoders, models

from services.engine.models.decoding import ByteTable
from services.engine.models.errors import ModelFileError
from services.engine.models.folder import ModelFolder
from services.engine.models.text import Detokenizer, Tokenizer

TEXTS = [
    "The capital is Tokyo.",
    "日本の首都は東京です。",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 skin",
    "é à é ñ Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A",
    "שלום عالم हिन्दी ไทย",
    "tabs\tand\r\nlines\u2028\u00a0\ufeff\x00\x7f",
    "\U0010ffff\ue000\ufffd",
    "<|im_end|> <think>x</think> \uff5c思考\uff5c",
]


@pytest.fixture
def tokenizer(hf_folder: Path) -> Tokenizer:
    return Tokenizer(ModelFolder(hf_folder, "tiny"))


def pushed(tokenizer: Tokenizer, pieces: list[list[int]]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(piece) for piece in pieces] + [detokenizer.finish()]


def cut(ids: list[int], cuts: list[int]) -> list[list[int]]:
    at = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(at)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Reference) -> Tokenizer:
    folder = tmp_path_factory.mktemp("folder")
    tokenizer_file.save(str(folder / "tokenizer.json"))
    config = {"max_position_embeddings": 128, "vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    return Tokenizer(ModelFolder(folder, "tiny"))


@given(
    ids=st.lists(st.integers(0, 299), max_size=60), cuts=st.lists(st.integers(0, 60), max_size=9)
)
@settings(max_examples=500, deadline=None)
def test_any_tokens_however_cut_are_their_whole_decode(
    shared: Tokenizer, tokenizer_file: Reference, ids: list[int], cuts: list[int]
) -> None:
    """Random bytes mostly: incomplete, overlong and lone continuation bytes, surrogates."""
    expected = tokenizer_file.decode(ids, skip_special_tokens=True)
    assert "".join(pushed(shared, cut(ids, cuts))) == expected
    assert shared.decode(ids) == expected


@given(
    data=st.binary(max_size=40).map(
        lambda raw: raw + b"\xf0\x9f\x98\x80\xed\xa0\x80\xc0\xaf\xf4\x90\x80\x80\xe2\x82"
    ),
    cuts=st.lists(st.integers(0, 60), max_size=9),
)
@settings(max_examples=300, deadline=None)
def test_invalid_bytes_become_what_a_whole_decode_makes_of_them(
    shared: Tokenizer, tokenizer_file: Reference, data: bytes, cuts: list[int]
) -> None:
    by_byte = {shared.table.join([i]): i for i in range(3, 259)}
    ids = [by_byte[bytes([b])] for b in data]
    expected = data.decode("utf-8", "replace")
    assert tokenizer_file.decode(ids) == expected
    assert "".join(pushed(shared, cut(ids, cuts))) == expected


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(shared: Tokenizer, text: str) -> None:
    ids = shared.encode(text)
    if not set(ids) & {0, 1, 2}:
        assert "".join(pushed(shared, [[i] for i in ids])) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_comes_whole_with_its_last_byte(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = pushed(tokenizer, [[i] for i in ids])
    assert "".join(pieces) == text.replace("<|im_end|>", "")
    assert pieces[-1] == ""
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    so_far = b""
    for token_id, piece in zip(ids, pieces, strict=False):
        so_far += tokenizer.table.join([token_id])
        try:
            expected = so_far.decode()
        except UnicodeDecodeError as error:
            expected = so_far[: error.start].decode()
        so_far = so_far[len(expected.encode()) :]
        assert piece == expected  # nothing held back that is complete


def test_what_never_became_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀")
    assert pushed(tokenizer, [ids[:-1]]) == ["a", "\ufffd"]
    assert pushed(tokenizer, []) == [""]


def test_unknown_ids_and_control_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    ids = [2, 10**6, -1, 299, 1, 0]
    assert pushed(tokenizer, [ids]) == ["", ""]


def sentence_piece() -> Reference:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += ["▁", "▁the", "▁Tokyo", "is", "東", "▁▁"]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    reference = Reference(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    reference.add_special_tokens(["<s>", "</s>"])
    reference.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return reference


@given(
    words=st.lists(
        st.sampled_from(["▁", "▁the", "▁Tokyo", "is", "東", "▁▁", "<s>", *"aé東😀"]), max_size=20
    ),
    cuts=st.lists(st.integers(0, 60), max_size=9),
)
@settings(max_examples=300, deadline=None)
def test_byte_fallback_is_the_reference_where_text_is_valid(
    words: list[str], cuts: list[int]
) -> None:
    reference = SENTENCE_PIECE
    ids = []
    for word in words:
        known = reference.token_to_id(word)
        ids += [known] if known is not None else [3 + b for b in word.encode()]
    tokenizer = SimpleNamespace(table=ByteTable.of(reference, Path("tokenizer.json")))
    assert "".join(pushed(tokenizer, cut(ids, cuts))) == reference.decode(ids)


SENTENCE_PIECE = sentence_piece()


def test_other_decoders_are_refused() -> None:
    reference = Reference(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    reference.decoder = decoders.WordPiece()
    with pytest.raises(ModelFileError, match="decoder WordPiece: only byte-level"):
        ByteTable.of(reference, Path("tokenizer.json"))
