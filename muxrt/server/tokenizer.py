"""Text to tokens and back: `tokenizer.json` of a Hugging Face folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from muxrt.errors import ConfigError

# How sentencepiece writes a space, and a byte that is no character of its vocabulary.
SPACE = "\u2581"
BYTE_TOKEN_CHARS = len("<0x00>")


class _TokenizerFile(msgspec.Struct):
    """The one part of tokenizer.json that `tokenizers` does not expose."""

    decoder: dict[str, Any] | None = None


def byte_alphabet() -> dict[str, int]:
    """GPT-2's bijection: the printable character that stands for each byte in byte-level BPE.

    Bytes that are printable in Latin-1 stand for themselves, the others for U+0100 onwards.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    alphabet = {chr(byte): byte for byte in own}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class Tokenizer:
    """Encodes text and knows the exact bytes of every token.

    Bytes, not strings, because a token may hold half a character: whoever joins them decides when
    a character is complete (`detokenize.py`).
    """

    def __init__(self, core: tokenizers.Tokenizer, is_byte_level: bool) -> None:
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._alphabet = byte_alphabet() if is_byte_level else None
        added = core.get_added_tokens_decoder()
        self._bytes = {token: entry.content.encode() for token, entry in added.items()}
        self._json: dict[int, bytes | None] = {}
        self._special = frozenset(token for token, entry in added.items() if entry.special)

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """The tokens of `text`; `add_special` puts what the model expects around it (bos).

        Runs without the GIL: long texts belong in a thread.
        """
        (encoded,) = self._core.encode_batch_fast([text], add_special_tokens=add_special)
        return encoded.ids

    def decode(self, tokens: list[int]) -> str:
        """The text of a whole sequence, special tokens skipped."""
        return self._core.decode(tokens, skip_special_tokens=True)

    def is_special(self, token: int) -> bool:
        """A control token: part of the sequence, not of its text."""
        return token in self._special

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that `token` adds to a text; none for an id beyond the vocabulary."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._to_bytes(self._core.id_to_token(token) or "")
        return known

    def json_text(self, token: int) -> bytes | None:
        """The text of `token` as JSON less the quotes; None if it is special or no whole text."""
        try:
            return self._json[token]
        except KeyError:
            text = self._json[token] = self._to_json(token)
            return text

    def _to_json(self, token: int) -> bytes | None:
        data = self.token_bytes(token)
        if self.is_special(token) or not data:
            return None
        try:
            return msgspec.json.encode(data.decode())[1:-1]
        except UnicodeDecodeError:
            return None

    def _to_bytes(self, piece: str) -> bytes:
        if self._alphabet is None:
            return _sentencepiece_bytes(piece)
        if all(char in self._alphabet for char in piece):
            return bytes([self._alphabet[char] for char in piece])
        return piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    if len(piece) == BYTE_TOKEN_CHARS and piece.startswith("<0x"):
        return bytes.fromhex(piece[3:5])
    return piece.replace(SPACE, " ").encode()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the model in `folder`. Raises ConfigError where it cannot be used."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(_missing(folder))
    try:
        data = path.read_bytes()
        decoder = msgspec.json.decode(data, type=_TokenizerFile).decoder
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    return Tokenizer(_parse(path, data), _is_byte_level(path, decoder))


def _missing(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder}: found tokenizer.model alone, expected tokenizer.json; transformers writes"
            " one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return f"{folder}: tokenizer.json is missing; a Hugging Face model folder holds one"


def _parse(path: Path, data: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    # The library raises nothing narrower than Exception, whatever is wrong with the file.
    except Exception as error:
        raise ConfigError(f"{path}: not a tokenizer: {error}") from None


def _is_byte_level(path: Path, decoder: dict[str, Any] | None) -> bool:
    """Whether tokens are written in the byte alphabet, or as sentencepiece writes them."""
    kinds = [step.get("type") for step in _steps(decoder or {})]
    if "ByteLevel" in kinds:
        return True
    if "Metaspace" in kinds or "ByteFallback" in kinds:
        return False
    found = ", ".join(str(kind) for kind in kinds) or "nothing"
    raise ConfigError(
        f"{path}: decoder: found {found}, expected ByteLevel (LLaMA 3, Qwen) or ByteFallback or"
        " Metaspace (LLaMA 1 and 2, Mistral)"
    )


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The decoder's steps in order; a sequence of steps is one decoder, too."""
    if decoder.get("type") == "Sequence":
        for step in decoder.get("decoders", ()):
            yield from _steps(step)
    elif decoder:
        yield decoder
