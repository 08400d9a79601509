"""Volumes of a pod as folders of this machine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tests.e2e.pods.objects import CreateContainerConfigError, Object, Objects, quantity
from tests.e2e.pods.podman import PodmanError, run


class Volumes:
    """A pod's volumes. Claims are folders that outlive the pod; tmpfs stands for `medium: Memory`, with its size limit."""

    def __init__(self, objects: Objects, folder: Path, claims: Path, group: int | None) -> None:
        self._objects = objects
        self._folder = folder
        self._claims = claims
        self._group = group
        self._mounted: list[Path] = []
        self._paths: dict[str, Path] = {}

    async def create(self, volumes: list[Object]) -> None:
        for volume in volumes:
            self._paths[volume["name"]] = await self._create(volume)

    async def remove(self) -> None:
        for path in self._mounted:
            await run("umount", str(path))

    def arguments(self, mounts: list[Object]) -> list[str]:
        """podman's arguments for a container's `volumeMounts`."""
        words: list[str] = []
        for mount in mounts:
            source = self._paths[mount["name"]]
            if mount.get("subPath"):
                source = source / mount["subPath"]
                source.mkdir(parents=True, exist_ok=True)
            words += ["--volume", f"{source}:{mount['mountPath']}:{'ro' if mount.get('readOnly') else 'rw'}"]
        return words

    async def _create(self, volume: Object) -> Path:
        (kind,) = volume.keys() - {"name"}
        path = self._folder / volume["name"]
        if kind == "persistentVolumeClaim":
            path = self._claims / volume[kind]["claimName"]
            if not path.is_dir():
                raise CreateContainerConfigError(f"persistentvolumeclaim {path.name} not found")
            return path
        path.mkdir(parents=True)
        if kind == "emptyDir":
            await self._empty(path, volume[kind])
        elif kind in ("configMap", "secret"):
            await asyncio.to_thread(self._files, path, kind, volume[kind])
        else:
            raise NotImplementedError(f"volumes of kind {kind}")
        return path

    async def _empty(self, path: Path, source: Object) -> None:
        if source.get("medium") == "Memory":
            size = int(quantity(source.get("sizeLimit", "1Gi")))
            status, said = await run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
            if status:
                raise PodmanError(f"tmpfs: {said}")
            self._mounted.append(path)
        os.chown(path, 0, self._group or 0)
        path.chmod(0o2777 if self._group else 0o777)

    def _files(self, path: Path, kind: str, source: Object) -> None:
        name = source["name"] if kind == "configMap" else source["secretName"]
        contents = self._objects.data("ConfigMap" if kind == "configMap" else "Secret", name)
        names = {item["key"]: item["path"] for item in source.get("items", [])} or {key: key for key in contents}
        mode = source.get("defaultMode", 0o644) | (0o440 if self._group else 0)
        for key, file_name in names.items():
            file = path / file_name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(contents[key])
            os.chown(file, 0, self._group or 0)
            file.chmod(mode)
