"""Lighter meshes and textures for drawing a MuJoCo model in software; its physics keeps the original ones."""

from __future__ import annotations

import copy
import ctypes
import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsrl_async.envs.simulator import mujoco

CANDIDATES = 12
"""Number of old corners near a new one that are compared."""


def lighter(model: mujoco.MjModel, faces: int, texture_size: int) -> mujoco.MjModel:
    """A copy of the model for drawing.

    Each mesh has at most about `faces` faces, and each two-dimensional texture at most `texture_size` pixels along its
    longer side.
    """
    light = copy.copy(model)
    for mesh in np.flatnonzero(light.mesh_facenum > faces).tolist():
        _simplify_mesh(light, mesh, faces)
    for texture in np.flatnonzero(np.maximum(light.tex_width, light.tex_height) > texture_size).tolist():
        if light.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_2D:  # a cube texture stacks its six sides
            _shrink_texture(light, texture, texture_size)
    return light


def _simplify_mesh(model: Any, mesh: int, faces: int) -> None:
    """Collapses edges (Garland and Heckbert, "Surface simplification using quadric error metrics", 1997).

    Each new corner takes the normal and the texture coordinate of that nearby old corner whose normal is closest to the
    direction that the new face looks in. This keeps edges sharp and the walls of a thin shell apart.
    """
    # These come with the extra `libero`, which importing this module must not need.
    import fast_simplification
    from scipy.spatial import cKDTree

    vertices = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
    first, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    corners = model.mesh_face[first : first + count].reshape(-1)
    normals = model.mesh_facenormal[first : first + count].reshape(-1).copy()
    coordinates = model.mesh_facetexcoord[first : first + count].reshape(-1).copy()
    positions = vertices[corners]
    # A mesh repeats a vertex for every texture coordinate. Copies that are not joined would be torn apart.
    joined, triangles = np.unique(vertices, axis=0, return_inverse=True)
    triangles = triangles.reshape(-1)[corners].reshape(-1, 3).astype(np.int32)
    points, kept = fast_simplification.simplify(joined, triangles, target_count=faces)
    if not 0 < len(kept) < count or len(points) > len(vertices):
        return

    edges = points[kept]
    facing = np.cross(edges[:, 1] - edges[:, 0], edges[:, 2] - edges[:, 0]).repeat(3, axis=0)
    _, near = cKDTree(positions).query(edges.reshape(-1, 3), k=CANDIDATES)
    old_normals = model.mesh_normal[model.mesh_normaladr[mesh] :][normals[near]]
    best = near[np.arange(len(near)), np.einsum("ij,ikj->ik", facing, old_normals).argmax(1)].reshape(-1, 3)
    new = slice(first, first + len(kept))
    vertices[: len(points)] = points
    model.mesh_face[new] = kept
    model.mesh_facenormal[new] = normals[best]
    model.mesh_facetexcoord[new] = coordinates[best]
    model.mesh_facenum[mesh] = len(kept)


def _shrink_texture(model: Any, texture: int, size: int) -> None:
    width, height, channels = (int(getattr(model, f"tex_{name}")[texture]) for name in ("width", "height", "nchannel"))
    first = int(model.tex_adr[texture])
    pixels = model.tex_data[first : first + width * height * channels].reshape(height, width, channels)
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    small = np.asarray(image.reduce(math.ceil(max(width, height) / size)))
    model.tex_data[first : first + small.size] = small.reshape(-1)
    model.tex_height[texture], model.tex_width[texture] = small.shape[:2]


def release_pages(values: NDArray[np.uint8]) -> None:
    """Gives the memory of an array back to the system; its values are lost.

    The array must be in private memory (as a MuJoCo model's is), not in a file or shared. Nothing happens where the
    system cannot do it.
    """
    first = -(-values.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (values.ctypes.data + values.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
