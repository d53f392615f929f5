"""From a file to its documents.

A file is text (one document, or several between lines of <|endoftext|>) or rows (JSON lines, a JSON
list, parquet), whatever the case of its suffix; .gz or .zst may follow.
"""

import codecs
import gzip
import json
import re
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from data.encodings import END
from data.files import FileList
from engine import UserError, first_line

JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
KNOWN = (*JSON_LINES, *TABLES, ".json", ".parquet")  # the others are text, or skipped
PACKED = (".gz", ".zst")
CHUNK = 2**20  # bytes unpacked at a time

ROLES = {"system", "user", "assistant"}  # of a chat
PAIR = ("prompt", "completion")
ANSWERS = ("assistant", "completion")
ROW_KEYS = (("text",), ("messages",), PAIR)  # the first that a row has all of is read
END_LINE = re.compile(rf"^[^\S\n]*{re.escape(END)}[^\S\n]*(?:\n|\Z)", re.MULTILINE)


@dataclass(frozen=True)
class FineTuningRow:
    """A chat, or a prompt and its completion."""

    turns: tuple[tuple[str, str], ...]  # (role, content); the roles of a pair: prompt, completion
    place: str = field(compare=False)  # file:line, or file[number]

    def encode(self) -> bytes:
        """The row as bytes: what tells rows apart, and their size (str.encode of a document)."""
        return json.dumps(self.turns).encode()


Documents = list[str] | list[FineTuningRow]


def suffixes(file: Path) -> tuple[str, str]:
    """(the kind, how it is packed) of a file, in lower case: (".jsonl", ".gz"); "" for none."""
    endings = [ending.lower() for ending in file.suffixes]
    packing = ""
    if endings and endings[-1] in PACKED:
        packing = endings.pop()
    known = [ending for ending in endings if ending in KNOWN]  # x.jsonl.1 is JSON lines
    kinds = known or endings or [""]
    return kinds[-1], packing


def read_file(file: Path, found: FileList, given: bool = False) -> Documents | None:
    """The documents of one file; None where it is skipped, which a remark says.

    given: the user named this file, not its folder.
    Raises UserError for a broken file, and for a row that is none.
    """
    kind, packing = suffixes(file)
    if kind in TABLES:
        found.remarks["table(s) skipped: write them as .jsonl or .parquet"].append(file)
        return None
    if kind == ".parquet":
        return read_parquet(file)

    text = decode(unpack(file, packing))
    if text is None:
        found.remarks["skipped that are not UTF-8 text"].append(file)
        return None
    if kind in JSON_LINES or kind == ".json":
        return read_json(file, text, found, is_strict=given or kind != ".json")
    if END not in text:
        return [text]
    documents = END_LINE.split(text)
    if len(documents) > 1:
        found.remarks[f"cut into documents at lines of {END}"].append(file)
    return documents


def unpack(file: Path, packing: str) -> bytes:
    """The file's content; UserError where a packed one is broken, as by a download cut short."""
    try:
        if packing == ".zst":
            return unpack_zst(file)
        content = file.read_bytes()
        return gzip.decompress(content) if packing == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise broken(file, error) from None


def unpack_zst(file: Path) -> bytes:
    """All frames of a .zst file."""
    try:
        import zstandard
    except ImportError:
        raise missing_library(file, "zstandard") from None
    packed = zstandard.ZstdDecompressor(max_window_size=2**31)  # of zstd --long=31
    frame = None
    parts = []
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            while chunk:
                if frame is None or frame.eof:
                    frame = packed.decompressobj()
                try:
                    parts.append(frame.decompress(chunk))
                except zstandard.ZstdError as error:
                    raise broken(file, error) from None
                chunk = frame.unused_data
    if frame is not None and not frame.eof:
        raise EOFError("it ends too early")
    return b"".join(parts)


def missing_library(file: Path, name: str) -> UserError:
    return UserError(f"data.path={file}: reading it takes {name}; pip install -e '.[data]'")


def broken(file: Path, error: Exception) -> UserError:
    message = first_line(error)
    return UserError(f"data.path={file}: cannot be unpacked ({message}); fetch it again")


def decode(content: bytes) -> str | None:
    """UTF-8, or UTF-16 after its byte order mark; None where it is neither, or not text."""
    is_utf16 = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text[:8192] else text


def read_json(file: Path, text: str, found: FileList, is_strict: bool) -> Documents | None:
    """The rows of a JSON list, of JSON lines or of one object.

    UserError for an entry that is no row. If none is one, that is so only where is_strict: in a
    folder of code a package.json is text, and a list of something else is skipped.
    """
    entries = json_entries(file, text)
    documents = []
    first_error = None
    for entry, place in entries:
        try:
            documents.append(parse_entry(entry, place))
        except UserError as error:
            first_error = first_error or error
    if first_error and (documents or is_strict):
        raise first_error
    if documents or not entries:
        return documents

    objects = [entry for entry, _ in entries if isinstance(entry, dict)]
    if len(objects) > 1 or text.lstrip().startswith("["):
        found.remarks["JSON list(s) without rows skipped"].append(file)
        return None
    found.remarks["JSON file(s) without rows read as text"].append(file)
    return [text]


def json_entries(file: Path, text: str) -> list[tuple[object, str]]:
    """(entry, its place) of a JSON list, or of JSON lines; None for a line that is not JSON."""
    if suffixes(file)[0] == ".json" or text.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            content = json.loads(text)
            values = content if isinstance(content, list) else [content]
            return [(value, f"{file}[{number}]") for number, value in enumerate(values)]

    entries = []
    # splitlines would also cut at U+2028, which JSON allows inside a string
    for number, line in enumerate(text.split("\n"), start=1):
        entry = None
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
        if line.strip():
            entries.append((entry, f"{file}:{number}"))
    return entries


def parse_entry(entry, place: str) -> str | FineTuningRow:
    """The text or the fine-tuning row of an entry; UserError naming its `place`."""
    try:
        if "text" in entry:
            if entry["text"] is None:  # as tables have it where there is no text
                return ""
            turns = [("text", entry["text"])]
        elif "messages" in entry:
            turns = [(message["role"], message["content"]) for message in entry["messages"]]
        else:
            turns = [(role, entry[role]) for role in PAIR]
        for _, content in turns:
            content.encode()  # half a surrogate pair is JSON, but no text
        if "text" in entry:
            return entry["text"]
        answers = [content.strip() for role, content in turns if role in ANSWERS]
        roles = ROLES if "messages" in entry else PAIR
        is_good = answers and all(answers) and all(role in roles for role, _ in turns)
    except (ValueError, KeyError, TypeError, AttributeError):
        is_good = False
    if not is_good:
        raise UserError(
            f'data.path={place}: neither "text", nor "prompt" and "completion", nor "messages" of '
            '"role" (system, user, assistant) and "content", or an answer is empty; mend it, or '
            "keep the file out of data.path"
        )
    return FineTuningRow(tuple(turns), place)


def read_parquet(file: Path) -> Documents:
    """The rows of a parquet file, of the columns that a row has in JSON."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise missing_library(file, "pyarrow") from None
    documents = []
    try:
        with parquet.ParquetFile(file) as table:
            columns = text_columns(file, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for entry in batch.to_pylist():
                    documents.append(parse_entry(entry, f"{file}[{len(documents)}]"))
    except (ArrowException, OSError) as error:
        raise broken(file, error) from None
    return documents


def text_columns(file: Path, names: list[str]) -> list[str]:
    """The columns that are read, of those with these names."""
    for keys in ROW_KEYS:
        if set(keys) <= set(names):
            return list(keys)
    raise UserError(
        f"data.path={file}: has the columns {', '.join(names)}; rename one to text, or give "
        "messages, or prompt and completion"
    )
