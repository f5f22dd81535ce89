"""What of a folder a death of the process, or a loss of power, would leave: after every call that changes the folder.

A model of a strict disk. Bytes are safe once their file was synced, names once their folder was. Until then a loss of
power may keep or lose each change of a name by itself, and cut a file to what was synced, or anywhere behind it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sm_train.train import checkpoint

Tree = dict[str, bytes | str | None]
"""By path: a file's bytes, a link's target, None for a folder."""
_CALLS = ("mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "open", "writev", "fsync")
_ROOT = 0


@dataclass
class Thing:
    """A file, a link or a folder, whatever its name."""

    value: bytes | str | None
    synced: bytes = b""

    def cut(self, to: str) -> bytes | str | None:
        """What is left of it: all | half | nothing of what was not synced."""
        if not isinstance(self.value, bytes) or to == "all" or self.value == self.synced:
            return self.value
        kept = self.synced if self.value.startswith(self.synced) else b""  # it was added to, or written anew
        rest = self.value.removeprefix(kept)
        return kept + (rest[: len(rest) // 2] if to == "half" else b"")


Names = dict[tuple[int, str], int]
Change = dict[tuple[int, str], int | None]


class Disk:
    """Follows a folder, once :meth:`follow` has patched the calls that change it.

    Args:
        at_change: called after each change with the call that made it.
    """

    def __init__(self, root: Path, at_change: Callable[[str], object]) -> None:
        self.root, self.at_change = root, at_change
        self.things: dict[int, Thing] = {_ROOT: Thing(None)}
        self._of_inode: dict[int, int] = {root.stat().st_ino: _ROOT}
        self.names: Names = {}
        self.pending: list[Change] = []
        self.before: dict[int, bytes] = {}
        self.look()
        self.durable = dict(self.names)  # what was there before is safe
        self.pending.clear()
        for thing in self.things.values():
            thing.synced = thing.value if isinstance(thing.value, bytes) else b""

    def follow(self, patch: pytest.MonkeyPatch) -> None:
        """Look after every call that changes something."""

        def followed(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                done = real(*args, **kwargs)
                if name == "fsync":
                    self._sync(args[0])
                if name != "open" or args[1] & os.O_CREAT:
                    self.look(f"{name} {args[-1] if name == 'save_file' else args[0]}")
                return done

            return call

        for name in _CALLS:
            patch.setattr(os, name, followed(name, getattr(os, name)))
        patch.setattr(checkpoint, "save_file", followed("save_file", checkpoint.save_file))
        for name in ("write_text", "write_bytes"):
            patch.setattr(Path, name, followed(name, getattr(Path, name)))

    def look(self, call: str = "start") -> None:
        """Take in what has changed."""
        names, inodes = self._scan()
        gone = [i for i in self._of_inode if i not in inodes]
        for inode in gone:
            del self._of_inode[inode]
        change: Change = {place: thing for place, thing in names.items() if self.names.get(place) != thing}
        change |= {place: None for place in self.names if place not in names}
        self.names = names
        if change:
            self.pending.append(change)
        if call != "start":
            self.at_change(call)

    def _scan(self) -> tuple[Names, set[int]]:
        names, inodes = {}, {self.root.stat().st_ino}
        self.before = {}
        folders = [(self.root, _ROOT)]
        while folders:
            folder, own = folders.pop()
            for path in sorted(folder.iterdir()):
                inode = path.lstat().st_ino
                inodes.add(inode)
                value = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
                is_new = inode not in self._of_inode
                number = self._of_inode.setdefault(inode, len(self.things))
                thing = self.things.setdefault(number, Thing(value))
                if is_new or thing.value != value:
                    self.before[number] = thing.value if isinstance(thing.value, bytes) and not is_new else b""
                thing.value = value
                names[own, path.name] = number
                if value is None:
                    folders.append((path, number))
        return names, inodes

    def _sync(self, handle: int) -> None:
        number = self._of_inode.get(os.fstat(handle).st_ino)
        if number is None:
            return
        thing = self.things[number]
        if isinstance(thing.value, bytes):
            thing.synced = thing.value
            return
        for change in [c for c in self.pending if {folder for folder, _ in c} == {number}]:
            apply(self.durable, change)
            self.pending.remove(change)

    def after_death(self) -> Iterator[Tree]:
        """Everything done so far is there; what the last call wrote may be there in part."""
        for to in ("all", "half", "nothing"):
            yield self._tree(self.names, lambda n, to=to: self._part(n, to))  # type: ignore[misc]

    def _part(self, number: int, to: str) -> bytes | str | None:
        value = self.things[number].value
        return Thing(value, self.before[number]).cut(to) if number in self.before else value

    def after_power_loss(self, thorough: bool) -> Iterator[Tree]:
        """Some of the names that are not yet durable are there, and some of the bytes.

        Args:
            thorough: not only all or none of the changes of names, but also each alone, all but each, and the first
                few; and each file cut by itself.
        """
        count = len(self.pending)
        chosen = [range(count), range(0)]
        if thorough:
            chosen += [range(n) for n in range(1, count)]
        kept = [set(numbers) for numbers in chosen]
        if thorough:
            kept += [{n} for n in range(count)] + [set(range(count)) - {n} for n in range(count)]
        for numbers in kept:
            names = dict(self.durable)
            for number, change in enumerate(self.pending):
                if number in numbers:
                    apply(names, change)
            for to in ("all", "half", "nothing"):
                yield self._tree(names, lambda n, to=to: self.things[n].cut(to))  # type: ignore[misc]
            for one in sorted({*names.values()}) if thorough else ():
                yield self._tree(names, lambda n, one=one: self.things[n].cut("nothing" if n == one else "all"))  # type: ignore[misc]

    def _tree(self, names: Names, value: Callable[[int], bytes | str | None]) -> Tree:
        tree: Tree = {}
        folders = [("", _ROOT)]
        while folders:
            path, own = folders.pop()
            for (folder, name), number in names.items():
                if folder == own:
                    tree[path + name] = value(number)
                    if self.things[number].value is None:
                        folders.append((f"{path}{name}/", number))
        return tree


def apply(names: Names, change: Change) -> None:
    """Make a change of names."""
    for place, thing in change.items():
        names.pop(place, None)
        if thing is not None:
            names[place] = thing


def put(tree: Tree, root: Path) -> None:
    """Make a folder as a tree says."""
    root.mkdir(parents=True)
    for path in sorted(tree):
        value = tree[path]
        if value is None:
            (root / path).mkdir()
        elif isinstance(value, str):
            (root / path).symlink_to(value)
        else:
            (root / path).write_bytes(value)
