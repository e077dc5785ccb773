"""Where sidecars live: where the recipe says, beside the checkpoint, or in the cache; and how files are written and told apart."""

import ctypes
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from filelock import FileLock, Timeout

from fisher_mask_mergekit import hub
from fisher_mask_mergekit.checkpoint import Checkpoint
from fisher_mask_mergekit.errors import HubError, RecipeError
from fisher_mask_mergekit.settings import Kind

# A subfolder, because some inference servers load every .safetensors file at the top level.
BESIDE = Path("fisher") / "mask_fisher.safetensors"
FACTORED_BESIDE = Path("fisher") / "factored_fisher.safetensors"
DIAGONAL_BESIDE = Path("fisher") / "diagonal"  # A folder: as large as the weights, so in shards.
_INPUTS = (".safetensors", ".yml", ".yaml")
PLACES: dict[Kind, Path] = {"mask": BESIDE, "factored": FACTORED_BESIDE, "diagonal": DIAGONAL_BESIDE}


def cache_folder() -> Path:
    """``$FISHER_MASK_CACHE``, else ``fisher-mask-mergekit`` in the user's cache directory."""
    chosen = os.environ.get("FISHER_MASK_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fisher-mask-mergekit"


def cached(checkpoint: Checkpoint, kind: Kind = "mask") -> Path:
    """The checkpoint's place in the cache, keyed by id and revision, or by path for a local folder."""
    if checkpoint.revision is not None:
        key = f"{checkpoint.name.partition('@')[0].replace('/', '--')}--{checkpoint.revision}"
    else:
        base, _, adapter = adapted(checkpoint.name) or (str(checkpoint.folder), "", "")
        paths = [
            str(Path(part).resolve()) if Path(part).exists() else part for part in (base, adapter) if part
        ]
        digest = hashlib.sha256("+".join(paths).encode()).hexdigest()[:16]
        key = f"local--{Path(paths[-1]).name}-{digest}"
    return cache_folder() / key / PLACES[kind].name


def absolute(name: str) -> str:
    """A checkpoint's name with local paths absolute, of a base and its adapter each."""
    parts = name.split("+") if adapted(name) else [name]
    return "+".join(str(Path(part).resolve()) if Path(part).exists() else part for part in parts)


def adapted(name: str) -> tuple[str, str, str] | None:
    """Base and adapter of a reference ``base+adapter``; None if the name is none."""
    return name.partition("+") if "+" in name and not Path(name).exists() else None


def _beside(checkpoint: Checkpoint, kind: Kind) -> Path | None:
    """In the checkpoint's folder; in the adapter's, if that is what was measured and it lies here."""
    reference = adapted(checkpoint.name)
    if reference is None:
        return checkpoint.folder / PLACES[kind]
    return Path(reference[2]) / PLACES[kind] if Path(reference[2]).is_dir() else None


def find_all(checkpoint: Checkpoint, kind: Kind = "mask") -> Iterator[Path]:
    """The checkpoint's sidecars of a kind in the order a merge prefers them: beside it, then in the cache."""
    is_there = Path.is_dir if kind == "diagonal" else Path.is_file
    if (beside := _beside(checkpoint, kind)) and is_there(beside):
        yield beside
    if is_there(kept := cached(checkpoint, kind)):
        yield kept


def find(checkpoint: Checkpoint, kind: Kind = "mask") -> Path | None:
    """The sidecar that a merge uses unless the recipe names one."""
    # Asked for every tensor of a merge: what comes second is not looked up where there is a first.
    return next(find_all(checkpoint, kind), None)


def sidecar_of(given: str | None, checkpoint: Checkpoint | None, kind: Kind = "mask") -> Path | None:
    """The sidecar that a merge uses: the one that the recipe names, if it does; downloaded, if that is on the hub.

    Args:
        given: The recipe's ``sidecar``, if any.
        checkpoint: Whose it is; None for inputs that are in no files, which have only what is given.
        kind: What it must be.

    Raises:
        HubError: If it is on the hub and cannot be had from there.
    """
    if given and given.startswith(hub.PREFIX):
        if kind == "diagonal":
            raise HubError(
                f"{given}: a full-size sidecar is a folder, not one file\n  download it and name the folder:  "
                "hf download ORG/NAME --include 'fisher/diagonal/*' --local-dir FOLDER"
            )
        return hub.fetch(hub.parse(given)).path
    if given:
        return expanded(given)
    return find(checkpoint, kind) if checkpoint else None


def expanded(given: str) -> Path:
    """A path as a recipe's author gave it, with ``~`` written out.

    Raises:
        RecipeError: If it begins with the home folder of nobody.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"sidecar '{given}': {error}") from error


def destination(checkpoint: Checkpoint, kind: Kind = "mask") -> Path:
    """Where ``compute`` writes: beside a local checkpoint; to the cache if that is a hub id or read-only."""
    beside = _beside(checkpoint, kind)
    if checkpoint.revision is None and beside and os.access(beside.parent.parent, os.W_OK):
        return beside
    return cached(checkpoint, kind)


def of_share(path: Path, share: str | None) -> Path:
    """Where the sidecar of a share ``K/N`` goes, where that of all samples goes to ``path``: ``NAME-K-of-N``."""
    return path.with_stem(f"{path.stem}-{share.replace('/', '-of-')}") if share else path


@contextmanager
def alone(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep other processes from writing to ``path`` meanwhile; clears away what killed ones left half-written of it.

    The lock is the system's, on ``.NAME.lock`` beside it: it goes with its process, however that ends. Whoever
    only reads needs none, since what is written is renamed when it is whole.

    Args:
        path: A file or a folder, which need not exist.
        on_wait: Called if another process has it, once, before waiting for that; without it, this is an error.

    Raises:
        OSError: If it cannot be locked: read-only, or a file system without locks. BlockingIOError: if another
            process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), mode=0o666 & ~umask())
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        if on_wait is None:
            raise BlockingIOError(errno.EAGAIN, "another process is writing it") from error
        on_wait()
        lock.acquire()
    try:
        clear_half_written(path)
        yield
    finally:
        # Still locked, so that who waits for it finds that it has no name any more, and asks for the next.
        with suppress(OSError):  # Windows keeps files that are open.
            Path(lock.lock_file).unlink()
        lock.release()


def clear_away(path: Path) -> None:
    """Clear away what killed processes left of ``path``, unless one is writing to it now, or nothing may be written."""
    if any(path.parent.glob(f".{escape(path.name)}.*")) or any(_half_written(path)):
        with suppress(OSError), alone(path):
            pass


def clear_half_written(path: Path) -> None:
    """Remove what killed processes left half-written of ``path`` and its partial sums, which nobody writes to now."""
    for left in _half_written(path):
        with suppress(OSError):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _half_written(path: Path) -> Iterator[Path]:
    random = "?" * 8
    yield from path.parent.glob(f".{escape(path.name)}.{random}")
    yield from path.parent.glob(f"..{escape(path.name)}.partial*.{random}")


def partial_path(path: Path, rank: int = 0, count: int = 1) -> Path:
    """Where the sums of a measurement into ``path`` are kept until it is finished.

    Args:
        path: The sidecar's place.
        rank: Which of several processes has them: each keeps its own.
        count: How many there are.
    """
    return path.with_name(f".{path.name}.partial{f'-{rank}-of-{count}' if count > 1 else ''}")


def partials(path: Path) -> dict[Path, int]:
    """Partial sums of measurements into ``path`` that are here, and how many processes each measurement had."""
    pattern = re.compile(re.escape(f".{path.name}.partial") + r"(?:-\d{1,9}-of-(\d{1,9}))?")
    found = {
        file: pattern.fullmatch(file.name) for file in path.parent.glob(f".{escape(path.name)}.partial*")
    }
    return {file: int(match[1] or 1) for file, match in sorted(found.items()) if match and file.is_file()}


def remove_partials(path: Path, but: int | None = None) -> None:
    """Remove partial sums of measurements into ``path``.

    Args:
        path: The sidecar's place.
        but: Those of a measurement in so many processes stay.
    """
    for file, count in partials(path).items():
        if count != but:
            with suppress(OSError):  # What was measured is measured all the same.
                file.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: there is a whole file or none.

    Raises:
        OSError: If it cannot be written; whatever was at ``path`` is untouched.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file, which takes the place of ``path`` at the end, unless something is raised.

    Raises:
        OSError: If it cannot be written; whatever was at ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Give a whole folder the name of another, which is then at ``new``; or which need not exist.

    On Linux there is no moment without a folder of that name; elsewhere there is, between two renames.

    Raises:
        OSError: If it cannot be; both are as they were.
    """
    if not folder.exists():
        new.replace(folder)
    elif not _exchange(new, folder):
        old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        folder.replace(old)
        try:
            new.replace(folder)
        except OSError:
            old.replace(folder)
            raise
        old.replace(new)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux.
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def check_writable(*paths: Path | None, is_recipe: bool = False) -> None:
    """Refuse files of results that cannot be written, before anything is run.

    Args:
        *paths: The files; None for one that was not asked for.
        is_recipe: Whether it is a recipe that is written.

    Raises:
        RecipeError: If a path is a folder, lies in none or in one that is read-only, is named twice, or has the
            name of a sidecar or a recipe: then a file's name was forgotten, and the next argument taken for it.
    """
    given = [path for path in paths if path is not None]
    for path in given:
        folder = path.resolve().parent
        why = ""
        if path.is_dir():
            why = "it is a folder"
        elif not folder.is_dir():
            why = "its folder does not exist"
        elif not os.access(folder, os.W_OK):
            why = "its folder is read-only"
        elif path.suffix in _INPUTS and not is_recipe:
            why = f"{path.suffix} is the name of a sidecar or a recipe"
        elif [other.resolve() for other in given].count(path.resolve()) > 1:
            why = "two results would be written there"
        if why:
            raise RecipeError(f"cannot write {path}: {why}")


def write_result(path: Path, content: bytes) -> None:
    """Write a file that a user asked for, whole or not at all.

    Raises:
        RecipeError: If it cannot be written.
    """
    check_writable(path)
    try:
        write_whole(path, content)
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror or error}") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def umask() -> int:
    """The process's, which temporary files are not made by."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
