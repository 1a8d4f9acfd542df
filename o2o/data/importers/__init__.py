"""Importers: one file per format that labs have, behind one interface (`source.Source`), all into Minari datasets."""

from pathlib import Path

from o2o.data.importers.arrays import ArraysSource
from o2o.data.importers.columns import is_hdf5, is_npz, names_in
from o2o.data.importers.d4rl import D4rlSource
from o2o.data.importers.lerobot import LeRobotSource
from o2o.data.importers.ogbench import OgbenchSource
from o2o.data.importers.robomimic import RobomimicSource
from o2o.data.importers.source import Source, refuse_pickle
from o2o.errors import ConfigError, DatasetError, suggest

FORMATS: dict[str, type[Source]] = {
    kind.name: kind for kind in (LeRobotSource, RobomimicSource, D4rlSource, OgbenchSource, ArraysSource)
}
"""Every format, in the order in which they are tried: the first that detects itself is taken."""


def open_source(path: Path, form: str = "auto", episode_steps: int | None = None) -> Source:
    """Open a dataset of another format; `form` is a key of `FORMATS` or `auto`.

    Raises `ConfigError` for an unknown format, `DatasetError` if the data are missing, broken or of no known format.
    """
    if form != "auto" and form not in FORMATS:
        raise ConfigError(f"no format {form!r}; {suggest(form, ('auto', *FORMATS))}")
    if episode_steps is not None and episode_steps < 1:
        raise ConfigError(f"`episode_steps` is {episode_steps}; expected at least 1")
    if not path.exists():
        raise DatasetError(f"{path} is not there; give a file or the folder of a LeRobot dataset")
    refuse_pickle(path)
    kinds = [FORMATS[form]] if form != "auto" else [kind for kind in FORMATS.values() if kind.detect(path)]
    if not kinds:
        raise DatasetError(f"{path} is of no known format ({_found(path)}); there are {', '.join(FORMATS)}")
    if form == "lerobot" and not path.is_dir() or form not in ("auto", "lerobot") and not path.is_file():
        raise DatasetError(f"{path} is no {'folder' if form == 'lerobot' else 'file'}, which format {form} needs")
    return kinds[0](path, episode_steps)


def _found(path: Path) -> str:
    """Return what is at a path, for an error."""
    if path.is_dir():
        inside = sorted(child.name for child in path.iterdir())[:8]
        return f"a folder with {', '.join(inside) or 'nothing in it'}"
    if is_hdf5(path) or is_npz(path):
        kind = "an HDF5 file" if is_hdf5(path) else "a zip file"
        names = names_in(path)[:12]
        return f"{kind} with {', '.join(names)}" if names else f"{kind} that is truncated or has no arrays"
    return "neither HDF5 nor npz"
