"""Lighter meshes and textures for drawing; needs no OpenGL."""

from __future__ import annotations

import mmap

import mujoco
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("fast_simplification", reason="needs the extra `libero`")

from dsrl_async.envs import light_graphics


def shell(rings: int, sides: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """An open bowl of two walls 4 % apart: vertices [V, 3] and faces [F, 3]."""
    vertices: list[NDArray[np.float64]] = []
    faces: list[tuple[int, ...]] = []
    for wall, radius in enumerate((1.0, 0.96)):
        first = len(vertices)
        for ring in range(rings + 1):
            polar = np.pi / 2 * (0.1 + 0.9 * ring / rings)
            for side in range(sides):
                around = 2 * np.pi * side / sides
                vertices.append(
                    radius * np.array([np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), -np.cos(polar)])
                )
        for ring in range(rings):
            for side in range(sides):
                a, b = first + ring * sides + side, first + ring * sides + (side + 1) % sides
                quad = [(a, b, a + sides), (b, b + sides, a + sides)]
                faces += quad if wall == 0 else [triangle[::-1] for triangle in quad]
    return np.array(vertices), np.array(faces)


@pytest.fixture
def model() -> mujoco.MjModel:
    vertices, faces = shell(24, 64)
    spec = mujoco.MjSpec()
    spec.add_mesh(
        name="bowl",
        uservert=vertices.reshape(-1),
        userface=faces.reshape(-1),
        usertexcoord=vertices[:, :2].reshape(-1),
        inertia=mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL,
    )
    for name, width, height in (("large", 256, 128), ("small", 32, 32)):
        spec.add_texture(
            name=name,
            type=mujoco.mjtTexture.mjTEXTURE_2D,
            builtin=mujoco.mjtBuiltin.mjBUILTIN_CHECKER,
            rgb1=[1, 0, 0],
            rgb2=[0, 0, 1],
            width=width,
            height=height,
        )
        spec.add_material(name=name).textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name
    body = spec.worldbody.add_body()
    body.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname="bowl", material="large")
    return spec.compile()


def triangles(model: mujoco.MjModel) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corner positions [F, 3, 3] of mesh 0 and its corners' normals [F, 3, 3]."""
    count = model.mesh_facenum[0]
    return model.mesh_vert[model.mesh_face[:count]], model.mesh_normal[model.mesh_facenormal[:count]]


def test_a_mesh_keeps_its_shape_with_fewer_faces(model: mujoco.MjModel) -> None:
    before = triangles(model)[0]
    assert len(before) == 2 * 2 * 24 * 64
    corners, normals = triangles(light_graphics.lighter(model, 600, 64))
    assert 300 < len(corners) <= 600
    np.testing.assert_allclose(corners.min((0, 1)), before.min((0, 1)), atol=0.03)
    np.testing.assert_allclose(corners.max((0, 1)), before.max((0, 1)), atol=0.03)
    facing = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = np.linalg.norm(facing, axis=1) / 2
    # Both walls are still there, each lit from its own side.
    whole = np.cross(before[:, 1] - before[:, 0], before[:, 2] - before[:, 0])
    assert areas.sum() == pytest.approx(np.linalg.norm(whole, axis=1).sum() / 2, rel=0.05)
    likeness = (normals * (facing / (2 * areas[:, None]))[:, None]).sum(-1)
    assert likeness.min() > 0.5


def test_a_large_texture_is_averaged_and_a_small_one_left(model: mujoco.MjModel) -> None:
    small = model.tex_data[model.tex_adr[1] :].copy()
    light = light_graphics.lighter(model, 600, 64)
    assert list(light.tex_width) == [64, 32]
    assert list(light.tex_height) == [32, 32]
    picture = light.tex_data[: 64 * 32 * 3].reshape(32, 64, 3)
    assert picture[0, 0].tolist() == [255, 0, 0]
    assert picture[0, -1].tolist() == [0, 0, 255]
    np.testing.assert_array_equal(light.tex_data[light.tex_adr[1] :], small)


def test_the_model_itself_stays_as_it_is(model: mujoco.MjModel) -> None:
    names = ["mesh_vert", "mesh_face", "mesh_facenormal", "mesh_facetexcoord", "mesh_facenum"]
    names += ["tex_data", "tex_width", "tex_height"]
    before = {name: getattr(model, name).copy() for name in names}
    assert light_graphics.lighter(model, 600, 64).mesh_facenum[0] < before["mesh_facenum"][0]
    for name, values in before.items():
        np.testing.assert_array_equal(getattr(model, name), values)


def test_released_memory_is_zeroed_and_its_neighbours_are_not() -> None:
    memory = np.frombuffer(mmap.mmap(-1, 4 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    memory[:] = 7
    light_graphics.release_pages(memory[100:-100])
    assert not memory[mmap.PAGESIZE : -mmap.PAGESIZE].any()
    assert (memory[: mmap.PAGESIZE] == 7).all()
    assert (memory[-mmap.PAGESIZE :] == 7).all()
