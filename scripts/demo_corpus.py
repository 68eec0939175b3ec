"""The text of the demo models: what ships inside CPython, as chats and as passages."""

import ast
import codecs
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

# Best-known modules only: a few million parameters remember these well and more of them badly.
MODULES = """
    argparse base64 bisect calendar collections contextlib copy csv dataclasses datetime difflib
    enum fnmatch fractions functools getpass glob gzip hashlib heapq html json linecache
    mimetypes numbers operator os pathlib pickle posixpath pprint queue random re sched secrets
    shelve shlex shutil socket statistics string subprocess tempfile textwrap threading timeit
    traceback urllib.parse uuid warnings weakref zipfile asyncio.locks asyncio.queues
    asyncio.runners asyncio.tasks
""".split()
# The name a user types, where it is not that of the file.
PUBLIC_NAMES = {
    "posixpath": "os.path",
    "asyncio.locks": "asyncio",
    "asyncio.queues": "asyncio",
    "asyncio.runners": "asyncio",
    "asyncio.tasks": "asyncio",
}
QUESTIONS = (
    "What is {}?",
    "What does {} do?",
    "Explain {}.",
    "Tell me about {}.",
    "How does {} work?",
    "Describe {}.",
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You explain Python.", "Answer briefly.")
TOPIC_CHARS, ANSWER_CHARS, REFERENCE_CHARS, PASSAGE_CHARS = 640, 400, 1_000, 800


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing a user may ask about, in several wordings, and its answer."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """What the demo models learn: answers for chats, passages for completions."""

    entries: tuple[Entry, ...]
    passages: tuple[str, ...]

    def texts(self) -> list[str]:
        asked = [text for entry in self.entries for text in (entry.questions[0], entry.answer)]
        return [*asked, *self.passages, *SYSTEM_PROMPTS]


def load_corpus() -> Corpus:
    """The training text, in one repeatable order, no answer twice."""
    zen = zen_of_python()
    entries: dict[str, Entry] = {}
    for entry in (greeting(), about(("the Zen of Python", "`this`"), zen), *all_entries()):
        entries.setdefault(entry.answer, entry)
    passages = [zen, *(p for text in topics.values() for p in passages_of(text))]
    return Corpus(tuple(entries.values()), tuple(dict.fromkeys(passages)))


def all_entries() -> Iterator[Entry]:
    for key, text in topics.items():
        yield topic_entry(key, text)
        yield from signature_entries(text)
    for module in MODULES:
        yield from docstring_entries(module)


def greeting() -> Entry:
    return Entry(("Hello", "Hello!", "Hi", "Hi!", "Hello, who are you?"), "Hello world!")


def about(names: tuple[str, ...], answer: str) -> Entry:
    return Entry(tuple(form.format(name) for name in names for form in QUESTIONS), answer)


def zen_of_python() -> str:
    """The text of `this`, read from its source because importing it prints."""
    for node in ast.parse(module_path("this").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            return codecs.decode(str(node.value.value), "rot13")
    raise LookupError("this.py holds no text")


def module_path(module: str) -> Path:
    base = Path(sysconfig.get_paths()["stdlib"], *module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def clipped(text: str, limit_chars: int) -> str:
    """The leading paragraphs that fit; of a first one that does not, the sentences that do."""
    first, *rest = inspect.cleandoc(text).split("\n\n")
    if len(first) > limit_chars:
        ends = [found.end() for found in re.finditer(r"\.(?=\s)", first[:limit_chars])]
        return first[: ends[-1] if ends else limit_chars]
    for paragraph in rest:
        if len(first) + len(paragraph) + 2 > limit_chars:
            break
        first += "\n\n" + paragraph
    # A colon would announce what was cut off.
    return first.rstrip(": \n")


def heading(text: str) -> str:
    return text.partition("\n")[0]


def body(text: str) -> str:
    return text.split("\n", 2)[2].strip("\n")


def topic_entry(key: str, text: str) -> Entry:
    """A topic, asked for by its heading, the keywords in that, and its key if that is a word."""
    phrase = heading(text).lower().replace('"', "`")
    keywords = re.findall("`[^`]+`", phrase)
    words = [] if re.search("-|^types", key) else [key, f"`{key}`"]
    names = tuple(dict.fromkeys([phrase, *keywords, *words]))
    return about(names, clipped(body(text), TOPIC_CHARS))


def signature_entries(text: str) -> Iterator[Entry]:
    """`str.join(iterable)` and its like inside a topic: a line, then an indented description."""
    for found in re.finditer(r"^(\w+\.\w+)\(.*\)\n\n((?:   .*\n|\n)+)", text, re.MULTILINE):
        name, description = found.groups()
        yield about((name, f"`{name}`"), clipped(description, ANSWER_CHARS))


def docstring_entries(module: str) -> Iterator[Entry]:
    tree = ast.parse(module_path(module).read_text(encoding="utf-8"))
    public = PUBLIC_NAMES.get(module, module)
    if text := ast.get_docstring(tree):
        answer = clipped(text, ANSWER_CHARS)
        yield about((f"the {public} module", f"the `{public}` module", public), answer)
    for name, text in docstrings(tree, f"{public}."):
        yield about((name, f"`{name}`"), clipped(text, ANSWER_CHARS))


def docstrings(node: ast.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Name and docstring of every public function and class."""
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if child.name.startswith("_"):
            continue
        if text := ast.get_docstring(child):
            yield prefix + child.name, text


def passages_of(text: str) -> Iterator[str]:
    """The head of a topic in pieces of whole paragraphs, the heading with the first."""
    piece = ""
    for paragraph in text[:REFERENCE_CHARS].split("\n\n")[:-1] or [text]:
        if piece and len(piece) + len(paragraph) > PASSAGE_CHARS:
            yield piece
            piece = ""
        piece += "\n\n" * bool(piece) + paragraph.strip("\n")
    yield piece
