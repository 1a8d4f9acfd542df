"""Import: from an open source to a Minari dataset, episode by episode, so that a kill loses the one under way.

Every episode becomes a file of its own in a hidden folder beside the target, whole and synced before the next one is
read. The same command goes on from there. When all are there the dataset is written from them, appears under its id at
once, and the folder is deleted: an import needs twice the disk of what it makes, and the memory of one episode.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from o2o.data import files
from o2o.data.files import Episode
from o2o.data.importers import open_source
from o2o.data.importers.columns import reason
from o2o.data.importers.plan import Environment, FaultyEpisodeError, Options, Plan, as_json, make_plan
from o2o.data.importers.source import UNREADABLE, Raw, Source
from o2o.data.recorder import read_episode, write_episode
from o2o.data.spaces import ActionMap, ObservationSpec
from o2o.errors import DatasetError, O2OError
from o2o.files import write_atomically

HEADER, LOCK = "import.json", "lock"
REFUSED = "refused"
"""Marks an import that a faulty episode ended, so that one with other options may begin anew in its place."""
LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*")
LONGEST_LICENCE = 65_536


@dataclass(frozen=True, eq=False)
class Imported:
    """What an import made."""

    folder: Path
    plan: Plan
    episodes: int
    steps: int
    dropped: tuple[tuple[int, str], ...]
    """The episodes that were left out, by their number in the source, each with the reason."""
    licence: str | None


def plan_import(
    path: Path, form: str = "auto", options: Options | None = None, env: Environment | None = None
) -> tuple[Plan, str | None]:
    """Return what an import would do, and the licence of the source; nothing is written. Raises `O2OError`."""
    options = options or Options()
    with _opened(path, form, options) as source:
        return make_plan(source, options, env), licence_of(path, options)


def import_dataset(
    path: Path,
    dataset_id: str,
    form: str = "auto",
    options: Options | None = None,
    env: Environment | None = None,
    root: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    planned: Callable[[Plan, str | None], None] = lambda plan, licence: None,
) -> Imported:
    """Import `path` as the Minari dataset `dataset_id`; called again after an interruption, it goes on.

    `planned(plan, licence)` is called before the first episode, `progress(done, total)` after each. Raises
    `DatasetError` for a source that is broken, or where a half-finished import of something else is in the way, and
    `ConfigError` for options that do not fit. The source is only read.
    """
    options = options or Options()
    target = files.check_new(dataset_id, root)
    work = files.work_folder(target, "importing")
    with _opened(path, form, options) as source:
        plan = make_plan(source, options, env)
        planned(plan, licence_of(path, options))
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatasetError(f"{work} cannot be made: {error.strerror}; give another `root`") from error
        try:
            with FileLock(work / LOCK).acquire(timeout=0):
                return _import(source, plan, options, dataset_id, root, work, progress)
        except Timeout as error:
            raise DatasetError(f"another import into {dataset_id} is under way; wait for it") from error
        except OSError as error:
            raise DatasetError(
                f"{work}: {error.strerror or error}; free some space and give the command again"
            ) from error


def _import(
    source: Source, plan: Plan, options: Options, dataset_id: str, root: Path | None, work: Path, progress: Any
) -> Imported:
    fingerprint = fingerprint_of(source)
    header = {"format": plan.about.format, "options": as_json(options), "env": plan.spec and plan.spec.id}
    _begin(work, {"fingerprint": fingerprint, **header}, dataset_id)
    try:
        _convert(source, plan, options, work, progress)
    except FaultyEpisodeError:
        (work / REFUSED).touch()
        raise  # with --drop-bad it goes on from here
    except DatasetError:
        shutil.rmtree(work, ignore_errors=True)  # what mends it is another source, or other options
        raise
    kept, dropped = _kept(work), _dropped(work)
    if not kept:
        shutil.rmtree(work, ignore_errors=True)
        first = f"; {dropped[0][1]}" if dropped else ""
        raise DatasetError(f"{source.path}: none of {len(dropped)} episodes can be imported{first}")
    licence = licence_of(source.path, options)
    metadata = {
        "author": {"o2o"},
        "description": f"Imported by o2o from {plan.about.format} ({source.path.name}).",
        "source": {"format": plan.about.format, "name": source.path.resolve().name, **plan.about.details},
        "source_fingerprint": fingerprint,
        "license": licence,
        "import_options": as_json(options),
        "import_rules": list(plan.rules),
        "dropped_episodes": len(dropped),
    }
    folder = files.write_dataset(
        dataset_id,
        (read_episode(part, plan.observation_space, plan.action_space) for part in kept),
        observation_space=plan.observation_space,
        action_space=plan.action_space,
        spec=plan.spec,
        eval_spec=plan.spec,
        root=root,
        metadata=metadata,
    )
    shutil.rmtree(work, ignore_errors=True)
    about = files.read_info(folder / "data")
    return Imported(folder, plan, about.episodes, about.steps, tuple(dropped), licence)


def _convert(source: Source, plan: Plan, options: Options, work: Path, progress: Callable[[int, int], None]) -> None:
    """Write every episode that is not there yet as a file of its own; leave a note of one that is left out."""
    at = len(_kept(work)) + len(_dropped(work))
    for number, found in enumerate(_converted(source, plan, at), start=at):
        sound = _sound(found, number, source, plan, options)
        if isinstance(sound, str):
            write_atomically(work / f"{number:07d}.dropped", sound + "\n")
        else:
            write_episode(work / f"{number:07d}.npz", plan.observation_space, sound)
        progress(number + 1, plan.about.episodes)


class _opened:
    """Opens a source for a `with` statement; what its files raise becomes a `DatasetError`."""

    def __init__(self, path: Path, form: str, options: Options) -> None:
        self._path = path
        try:
            self._source = open_source(path, form, options.episode_steps)
        except O2OError:
            raise
        except UNREADABLE as error:
            raise _broken(path, error) from error

    def __enter__(self) -> Source:
        return self._source

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._source.close()
        if isinstance(error, UNREADABLE) and not isinstance(error, O2OError | Timeout):
            raise _broken(self._path, error) from error


def _broken(path: Path, error: BaseException, where: str = "") -> DatasetError:
    return DatasetError(
        f"{path}{where} cannot be read, it is truncated or of another kind ({type(error).__name__}: {reason(error)}); "
        "copy it again"
    )


def _begin(work: Path, header: dict[str, Any], dataset_id: str) -> None:
    """Write what is imported, or check that a half-finished import began with it; with other data it begins anew."""
    path = work / HEADER
    header = {**header, "options": {k: v for k, v in header["options"].items() if k not in ("drop_bad", "licence")}}
    before = json.loads(path.read_text()) if path.exists() else {}
    changed = [key for key in header if before.get(key) != header[key]]
    refused = (work / REFUSED).exists()
    (work / REFUSED).unlink(missing_ok=True)
    if "fingerprint" in changed or (changed and refused):
        for part in (*_kept(work), *work.glob("*.dropped")):
            part.unlink()
        write_atomically(path, json.dumps(header, indent=2) + "\n")
    elif changed:
        raise DatasetError(
            f"an import into {dataset_id} was interrupted, and its {', '.join(changed)} is not that of this one: give "
            f"the command that began it, or delete {work}"
        )


def _kept(work: Path) -> list[Path]:
    return sorted(work.glob("*.npz"))


def _dropped(work: Path) -> list[tuple[int, str]]:
    return [(int(path.stem), path.read_text().strip()) for path in sorted(work.glob("*.dropped"))]


def _converted(source: Source, plan: Plan, start: int) -> Iterator[Episode | str | FaultyEpisodeError]:
    """Yield the episodes from number `start` on in Minari's terms, or what is wrong with one.

    Raises `DatasetError` naming the episode where the source is broken.
    """
    episodes, number = iter(source.episodes(plan.keys, plan.sizes, start)), start
    while True:
        try:
            raw: Raw | None = next(episodes, None)
            if raw is None:
                return
            found = plan.episode(raw)
        except FaultyEpisodeError as error:
            found = error
        except DatasetError as error:
            text = str(error) if str(source.path) in str(error) else f"{source.path}: {error}"
            raise DatasetError(text if "episode" in str(error) else f"{text} (episode {number})") from error
        except UNREADABLE as error:
            raise _broken(source.path, error, f", episode {number} of {plan.about.episodes},") from error
        yield found
        number += 1


def _sound(
    found: Episode | str | FaultyEpisodeError, number: int, source: Source, plan: Plan, options: Options
) -> Episode | str:
    """Return an episode that is fit for training, or why it is left out; raise `DatasetError` without `drop_bad`."""
    if isinstance(found, str):
        return found
    if isinstance(found, FaultyEpisodeError):
        problem = f"episode {number}, {found}"
    else:
        spec = ObservationSpec.from_space(plan.observation_space, True)
        actions = ActionMap.from_space(plan.action_space)
        problem = next(files.problems(found, number, spec, actions, clip=True), None)
        if problem is None:
            return found
    if not options.drop_bad:
        raise FaultyEpisodeError(f"{source.path}: {problem}; or leave such episodes out with `drop_bad`")
    return problem


def fingerprint_of(source: Source) -> str:
    """Return the sha256 of the names and contents of a source's files; its location does not matter."""
    digest, base = hashlib.sha256(), source.path if source.path.is_dir() else source.path.parent
    for path in source.files():
        digest.update(path.relative_to(base).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def licence_of(path: Path, options: Options) -> str | None:
    """Return the text of a source's licence: the user's, a LICENSE file beside it, or what its README names."""
    if options.licence is not None:
        return options.licence
    folder = path if path.is_dir() else path.parent
    for pattern in LICENCE_FILES:
        for found in sorted(folder.glob(pattern)):
            if found.is_file():
                return found.read_text(errors="replace")[:LONGEST_LICENCE]
    readme = path / "README.md"
    if path.is_dir() and readme.is_file():
        head = re.match(r"---\n(.*?)\n---", readme.read_text(errors="replace"), re.DOTALL)
        named = re.search(r"^license:\s*(\S.*)$", head[1], re.MULTILINE) if head else None
        return named[1].strip() if named else None
    return None
