"""Text to tokens and back, stop strings, chat templates."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_folder import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    USER,
    byte_level,
    sentencepiece_like,
    write_tokenizer,
)
from tokenizers import Tokenizer as Core
from tokenizers import decoders

from muxrt.errors import BadRequest, ConfigError
from muxrt.server.chat_template import load_chat_template
from muxrt.server.detokenize import Detokenizer, StopScanner
from muxrt.server.tokenizer import Tokenizer, load_tokenizer

CORES = {"byte-level": byte_level(), "sentencepiece": sentencepiece_like()}
TOKENIZERS = {
    "byte-level": Tokenizer(CORES["byte-level"], is_byte_level=True),
    "sentencepiece": Tokenizer(CORES["sentencepiece"], is_byte_level=False),
}
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)


def stream(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    text = Detokenizer(tokenizer)
    return [*(text.push(token) for token in tokens), text.flush()]


@given(st.text(max_size=40))
@example("\U0001f600\u4f60\u597d e\u0301 \ufffd")
def test_what_is_encoded_comes_back(text: str) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    tokens = tokenizer.encode(text, add_special=True)
    assert "".join(stream(tokenizer, tokens)) == text


@given(st.lists(st.integers(0, CORES["byte-level"].get_vocab_size() - 1), max_size=30))
def test_any_tokens_read_as_the_library_reads_them_whole(tokens: list[int]) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    assert "".join(stream(tokenizer, tokens)) == tokenizer.decode(tokens)


@given(st.text("the quick fox\u00e9\U0001f600ab", max_size=20))
def test_byte_tokens_join_to_characters(text: str) -> None:
    core, tokenizer = CORES["sentencepiece"], TOKENIZERS["sentencepiece"]
    pieces = [core.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    assert "".join(stream(tokenizer, pieces)) == text == core.decode(pieces)


def test_a_sentencepiece_space_stays_between_prompt_and_answer() -> None:
    core, tokenizer = CORES["sentencepiece"], TOKENIZERS["sentencepiece"]
    tokens = [core.token_to_id("\u2581the"), core.token_to_id("\u2581quick")]
    assert stream(tokenizer, tokens) == [" the", " quick", ""]


def test_half_a_character_waits_for_the_rest() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    tokens = [token for byte in "\U0001f600".encode() for token in byte_token(byte)]
    assert stream(tokenizer, tokens) == ["", "", "", "\U0001f600", ""]
    assert stream(tokenizer, tokens[:2]) == ["", "", "\ufffd"]


def byte_token(byte: int) -> list[int]:
    tokenizer = TOKENIZERS["byte-level"]
    size = CORES["byte-level"].get_vocab_size()
    return [token for token in range(size) if tokenizer.token_bytes(token) == bytes([byte])][:1]


@KINDS
def test_special_tokens_are_no_text(kind: str) -> None:
    tokenizer, core = TOKENIZERS[kind], CORES[kind]
    assert stream(tokenizer, [core.token_to_id(BOS), core.token_to_id(EOS)]) == ["", "", ""]
    assert tokenizer.token_bytes(core.token_to_id(EOS)) == EOS.encode()


@KINDS
def test_an_id_beyond_the_vocabulary_is_no_text(kind: str) -> None:
    assert stream(TOKENIZERS[kind], [100_000]) == ["", ""]


# -- folders ---------------------------------------------------------------------------------


def test_the_decoder_decides_how_tokens_are_written(tmp_path: Path) -> None:
    for kind, core in CORES.items():
        write_tokenizer(tmp_path / kind, core)
        loaded = load_tokenizer(tmp_path / kind)
        token = core.token_to_id("\u2581the") or 5
        assert loaded.token_bytes(token) == TOKENIZERS[kind].token_bytes(token)


def test_truncation_of_the_file_is_not_ours(tmp_path: Path) -> None:
    core = byte_level()
    core.enable_truncation(3)
    write_tokenizer(tmp_path, core)
    assert len(load_tokenizer(tmp_path).encode("the quick brown fox", add_special=True)) > 3


def test_a_sentencepiece_model_alone_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ConfigError, match="tokenizer.model alone, expected tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "tokenizer.json is missing"),
        ("{", "not readable as JSON"),
        ("{}", "not a tokenizer"),
    ],
)
def test_a_broken_folder_is_one_clear_error(
    tmp_path: Path, content: str | None, error: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=error):
        load_tokenizer(tmp_path)


def test_a_decoder_we_cannot_follow_is_refused(tmp_path: Path) -> None:
    core = Core.from_str(byte_level().to_str())
    core.decoder = decoders.WordPiece()
    write_tokenizer(tmp_path, core)
    with pytest.raises(ConfigError, match="decoder: found WordPiece, expected ByteLevel"):
        load_tokenizer(tmp_path)


# -- stop strings ----------------------------------------------------------------------------

LETTERS = st.text("ab\u00e9", max_size=30)
STOPS = st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3)


def scan(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    scanner = StopScanner(stops)
    shown = [scanner.feed(piece) for piece in pieces]
    return [*shown, scanner.flush()], scanner.is_stopped


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that ends first; of those, before the longest."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(found)[1]], True) if found else (text, False)


@given(LETTERS, STOPS, st.lists(st.integers(0, 30)))
@example("aab", ["ab"], [1, 2])
@example("abab\u00e9", ["abb", "ab\u00e9"], [2])
def test_stops_are_found_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    bounds = [0, *sorted(min(at, len(text)) for at in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    shown, is_stopped = scan(pieces, stops)
    assert ("".join(shown), is_stopped) == cut(text, stops)


@given(LETTERS, STOPS)
def test_only_the_beginning_of_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    scanner, shown = StopScanner(stops), ""
    for index, char in enumerate(text, 1):
        shown += scanner.feed(char)
        if scanner.is_stopped:
            return
        held = text[len(shown) : index]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_nothing_is_shown_after_a_stop() -> None:
    assert scan(["a", "stop", "more"], ["stop"]) == (["a", "", "", ""], True)


# -- chat templates --------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "hello"}]


def test_a_template_of_the_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level(), chat_template=CHAT_TEMPLATE)
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render(HELLO) == f"{BOS}{USER}user: hello\n{USER}assistant: "


def test_a_named_template(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    write_tokenizer(tmp_path, byte_level(), chat_template=named)
    template = load_chat_template(tmp_path)
    assert template is not None and template.render(HELLO) == "yes"


def test_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level(), chat_template="config")
    (tmp_path / "chat_template.jinja").write_text("{{ messages | tojson }}{{ eos_token }}")
    template = load_chat_template(tmp_path)
    assert template is not None
    said = [{"role": "user", "content": "<\u00e9>"}]
    assert template.render(said) == json.dumps(said, ensure_ascii=False) + EOS


def test_no_template_is_no_error(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level())
    assert load_chat_template(tmp_path) is None


def test_what_a_template_refuses_is_the_clients_error(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level(), chat_template=CHAT_TEMPLATE)
    template = load_chat_template(tmp_path)
    assert template is not None
    with pytest.raises(BadRequest, match="no explosives") as caught:
        template.render([{"role": "user", "content": "boom"}])
    assert caught.value.param == "messages"


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    write_tokenizer(tmp_path, byte_level(), chat_template=escape)
    template = load_chat_template(tmp_path)
    assert template is not None
    with pytest.raises(BadRequest, match="unsafe"):
        template.render(HELLO)


def test_the_date_is_there_for_templates(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level(), chat_template="{{ strftime_now('%Y') }}")
    template = load_chat_template(tmp_path)
    assert template is not None and len(template.render(HELLO)) == 4


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{% if %}", "not valid jinja"),
        ([{"name": "rag", "template": "x"}], "found rag, expected one named default"),
        (3, "expected text or a list"),
    ],
)
def test_a_broken_template_is_one_clear_error(tmp_path: Path, source: object, error: str) -> None:
    write_tokenizer(tmp_path, byte_level(), chat_template=source)
    with pytest.raises(ConfigError, match=error):
        load_chat_template(tmp_path)
