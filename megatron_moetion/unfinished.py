"""A folder that is being written, and a small file beside it that is to name the newest one.

The host writes that file last. When it is cut short and begins again, the file must not name what
is being written.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_moetion.host import State


@dataclass(frozen=True)
class Unfinished:
    """What one rank knows of it, for all others.

    Attributes:
        folder: what is written.
        names: the file that names the newest one.
        name: what stands in it when this one is complete.
    """

    folder: Path
    names: Path
    name: str

    def note(self) -> State:
        """How things stand, to be known to whoever begins again."""
        return {"named": self.names.read_text() if self.names.exists() else None}

    def again(self, note: State) -> bool:
        """Makes undone what was half done.

        Args:
            note: from before it was begun for the first time.

        Returns:
            Whether it is complete, so that nothing is to be done again.
        """
        before, now = note["named"], self.note()["named"]
        if now == self.name != before:
            return True
        if now != before:
            # Whoever wrote it died in the middle.
            self._put_back(before)
        # If it was named before, it is not ours to take away.
        if before != self.name and self.folder.exists():
            shutil.rmtree(self.folder)
        return False

    def _put_back(self, text: str | None) -> None:
        if text is None:
            self.names.unlink()
            return
        aside = self.names.with_name(f"{self.names.name}.moetion")
        aside.write_text(text)
        aside.replace(self.names)
