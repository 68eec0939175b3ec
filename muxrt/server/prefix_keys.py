"""Hash keys of a prompt's full block groups: equal keys mean equal text before them."""

from hashlib import blake2b

KEY_BYTES = 16
TOKEN_BYTES = 4  # int32


def prefix_keys(
    model: str, tokens: bytes, block_tokens: int, salt: bytes = b""
) -> tuple[bytes, ...]:
    """One chained key per full group of `block_tokens` tokens (int32, little endian).

    The last token never counts: it must be computed to draw the next one. Keys of different models
    or salts never meet, so that a salt per API key keeps one tenant from probing another's prompts.
    """
    size = block_tokens * TOKEN_BYTES
    # blake2b takes at most 64 bytes of `key`: names and salts of any length are hashed as data.
    root = blake2b(f"{len(model)}:{model}:".encode() + salt, digest_size=KEY_BYTES)
    key, keys = root.digest(), []
    for end in range(size, len(tokens) - TOKEN_BYTES + 1, size):
        key = blake2b(key + tokens[end - size : end], digest_size=KEY_BYTES).digest()
        keys.append(key)
    return tuple(keys)
