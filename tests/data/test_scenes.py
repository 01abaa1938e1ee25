"""Views are exact, repeatable and varied."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import warnings

import numpy as np
import pytest
import torch

from distill.data import scenes
from distill.data.scenes import backends, reference, texture, variety
from distill.data.scenes.cast import (
    Camera,
    block,
    cast,
    clusters,
    cylinder,
    ellipsoid,
    ground,
    shadow,
    span,
    surfaces,
    turn,
)
from distill.data.scenes.stage import Stage
from distill.eval.benchmarks import scenes as benchmark
from tests.data.stages import under_a_block

SMALL = (48, 64)


def stage_of(seed: int, kind: str) -> Stage:
    stage = Stage(rng=np.random.default_rng(seed))
    scenes._LAYOUTS[kind][0](stage)
    return stage


def first_hit(solids, origin, ray) -> float:
    """The depth of one ray in float64, by the textbook: clip against every plane, then solve the quadratic."""
    best = math.inf
    for solid in solids:
        enter, leave = -math.inf, math.inf
        for nx, ny, nz, offset in solid.planes:
            slope = nx * ray[0] + ny * ray[1] + nz * ray[2]
            height = offset - (nx * origin[0] + ny * origin[1] + nz * origin[2])
            if slope < 0:
                enter = max(enter, height / slope)
            elif slope > 0:
                leave = min(leave, height / slope)
            elif height < 0:
                enter = math.inf
        if solid.quadric is not None:
            o, d = solid.quadric @ (np.array(origin) - np.array(solid.centre)), solid.quadric @ np.array(ray)
            a, b, c = d @ d, 2 * o @ d, o @ o - 1
            if a == 0 or b * b - 4 * a * c <= 0:
                continue
            root = math.sqrt(b * b - 4 * a * c)
            enter, leave = max(enter, (-b - root) / (2 * a)), min(leave, (-b + root) / (2 * a))
        reached = leave if solid.shell else enter
        if enter <= leave and 0.05 < reached < best:
            best = reached
    return best if best <= 1000 else math.inf


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_depth_agrees_with_the_textbook(kind):
    stage = stage_of(11, kind)
    height, width = 48, 64
    rays = [r[0] for r in stage.camera.rays(height, width)]
    depth = cast(stage.solids, stage.camera, tuple(r[None] for r in rays)).depth[0]
    rng, wrong = np.random.default_rng(0), 0
    pixels = rng.integers(0, (height, width), (120, 2))
    for row, column in pixels:
        want = first_hit(stage.solids, stage.camera.position, [float(r[row, column]) for r in rays])
        got = float(depth[row, column])
        wrong += not (got == want or abs(got - want) < 2e-5 * want)
    # A ray that grazes an edge may fall on either side of it.
    assert wrong <= 1


def test_the_depth_of_the_floor_is_its_formula():
    camera = Camera(position=(0.3, 1.7, -2.0), axes=turn(0.4, -0.35, 0.0), focal=0.8)
    height, width = 40, 60
    rays = camera.rays(height, width)
    depth = cast([ground(0)], camera, rays).depth[0, :height, :width]
    up = (height / 2 - (torch.arange(height) + 0.5)) / (0.8 * width)
    # z (sin p + y cos p) = -h for a camera pitched by p at height h.
    want = -1.7 / (math.sin(-0.35) + up.double() * math.cos(-0.35))
    seen = (want > 0) & (want < 1000)
    assert seen.sum() > 20
    torch.testing.assert_close(depth[seen].double(), want[seen, None].expand(-1, width), rtol=2e-5, atol=0)


def test_a_point_put_back_lies_on_the_surface():
    camera = Camera(position=(0.0, 1.0, 0.0), axes=turn(0.1, -0.1, 0.2), focal=0.9)
    things = [
        ellipsoid((0.5, 0.8, 40.0), (3.0, 2.0, 1.0), 0, axes=turn(0.5, 0.2)),
        cylinder((-6.0, 0.0, 30.0), 1.5, 2.0, 0, axes=turn(0.0, 0.3, 0.4)),
    ]
    rays = camera.rays(90, 90)
    for thing in things:
        hits = cast([thing], camera, rays)
        hit = torch.isfinite(hits.depth)
        assert hit.sum() > 50
        point = torch.stack([camera.position[i] + hits.depth[hit] * rays[i][hit] for i in range(3)]).double().numpy()
        away = point - np.array(thing.centre)[:, None]
        inside = ((thing.quadric @ away) ** 2).sum(0) - 1
        caps = [np.array(plane[:3]) @ point - plane[3] for plane in thing.planes]
        assert np.abs(np.max([inside, *caps], axis=0)).max() < 1e-4


def test_normals_face_the_camera():
    stage = stage_of(5, "room")
    rays = stage.camera.rays(40, 40)
    hits = cast(stage.solids, stage.camera, rays)
    table = surfaces(stage.solids)
    hit = hits.surface >= 0
    rows = hits.surface[hit]
    ray = torch.stack([r[hit] for r in rays], 1)
    point = torch.tensor(stage.camera.position) + hits.depth[hit][:, None] * ray
    normal = (table.gradient[rows] @ (point - table.centre[rows])[:, :, None])[:, :, 0] + table.constant[rows]
    assert ((normal * ray).sum(1) < 1e-3).float().mean() > 0.999


@pytest.mark.parametrize("kind", ["street", "table"])
def test_windows_on_the_screen_lose_nothing(kind):
    stage = stage_of(3, kind)
    rays = stage.camera.rays(50, 50, corners=True)
    quick = cast(stage.solids, stage.camera, rays)
    boundless = [dataclasses.replace(solid, corners=None) for solid in stage.solids]
    full = cast(boundless, stage.camera, rays)
    assert torch.equal(quick.depth, full.depth) and torch.equal(quick.surface, full.surface)


@pytest.mark.parametrize("kind", ["street", "room"])
def test_shadows_are_those_of_every_solid(kind):
    stage = stage_of(4, kind)
    lamp = stage.lights[0]
    rng = np.random.default_rng(1)
    points = [torch.tensor(rng.uniform(-8, 8, 3000), dtype=torch.float32) for _ in range(3)]
    points[1] = points[1].abs() / 4
    got = shadow(clusters(stage.solids), points, lamp.place, sun=lamp.sun)
    want = torch.zeros_like(got)
    for solid in stage.solids:
        if solid.casts and solid.corners is not None:
            if lamp.sun:
                enter, leave, _ = span(solid, points, lamp.place)
                want |= (enter <= leave) & (leave > 0) & (enter > -1e-3)
            else:
                enter, leave, _ = span(solid, lamp.place, [p - o for p, o in zip(points, lamp.place, strict=True)])
                want |= (enter <= leave) & (enter < 1) & (leave > 0) & (enter > 0)
    assert 0.02 < want.float().mean() < 0.98
    assert (got != want).float().mean() < 2e-3


def test_a_gable_ends_in_its_ridge():
    camera = Camera(position=(0.0, 1.0, -10.0), axes=turn(), focal=1.0)
    roof = block((0, 1, 0), (2, 1, 3), 0, top=(0, 1))
    depth = cast([roof], camera, camera.rays(200, 200)).depth[0, :200, :200]
    rows = torch.isfinite(depth).any(1).nonzero()[:, 0]
    widths = torch.isfinite(depth).sum(1)[rows]
    assert (widths.diff() >= 0).all() and widths[0] <= 2 and widths[-1] >= 100
    torch.testing.assert_close(depth[torch.isfinite(depth)].min(), torch.tensor(7.0))


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_a_view_is_repeatable_and_lawful(kind):
    torch.manual_seed(1)
    view = scenes.render(77, size=SMALL, kind=kind)
    torch.manual_seed(2)
    np.random.seed(3)  # noqa: NPY002 - the global state must not matter
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        again = scenes.render(77, size=SMALL, kind=kind)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(view.image, again.image) and torch.equal(view.depth, again.depth)
    assert view.image.shape == (3, *SMALL) and view.depth.shape == view.valid.shape == SMALL
    assert view.image.dtype == view.depth.dtype == torch.float32 and view.valid.dtype == torch.bool
    assert view.kind == kind and 0 <= view.image.min() and view.image.max() <= 1
    assert torch.isfinite(view.image).all() and torch.isfinite(view.depth).all()
    assert (view.depth[view.valid] >= 0.05).all() and (view.depth[~view.valid] == 0).all()
    assert view.valid.all() or kind in scenes.OUTDOORS


def test_views_differ_and_most_have_something_to_see():
    seeds = range(900, 910)
    views = [scenes.render(seed, size=(24, 32)) for seed in seeds]
    assert len({view.kind for view in views}) >= 4
    assert [view.kind for view in views] == [scenes.kind_of(seed) for seed in seeds]
    means = torch.stack([view.image.mean((1, 2)) for view in views])
    assert len({tuple(row.tolist()) for row in means}) == len(views)
    assert means.std(0).min() > 0.04 and 0.25 < means.mean() < 0.65
    ranges = [torch.quantile(v.depth[v.valid], torch.tensor([0.05, 0.95])) for v in views if v.valid.any()]
    assert sum(float(high / low) > 1.4 for low, high in ranges) >= 8


def test_a_pattern_is_drawn_when_it_is_seen_and_whatever_was_drawn_before(monkeypatch):
    at = torch.tensor([0.3, 0.7])
    seen = []
    for before in ([], [30, 6]):
        monkeypatch.setattr(texture, "_drawn", set())
        monkeypatch.setattr(texture, "_bank", functools.cache(texture._bank.__wrapped__))
        for number in before:
            texture.sample(torch.tensor([number, number]), at, at, at / 50)
        seen.append(texture.sample(torch.tensor([6, 7]), at, at, at / 50))
        assert texture._drawn == {6, 7, *before}
    assert torch.equal(*seen) and (seen[0] > 0).all() and seen[0].std() > 0.01


def test_size_changes_the_grid_not_the_place():
    large, small = (scenes.render(5, size=(side, side), kind="room").depth for side in (90, 30))
    torch.testing.assert_close(large[1::3, 1::3], small, rtol=1e-5, atol=1e-5)


def test_variety_adds_to_a_view_and_leaves_the_plain_one_as_it_was():
    plain, varied, again, after = (
        scenes.render(77, size=(24, 32), variety=flag) for flag in (False, True, True, False)
    )
    assert torch.equal(varied.image, again.image) and torch.equal(varied.depth, again.depth)
    assert torch.equal(plain.image, after.image) and torch.equal(plain.depth, after.depth)
    assert not torch.equal(plain.image, varied.image) and varied.focal == plain.focal and varied.kind == plain.kind
    with scenes.cached_views():
        assert not torch.equal(
            scenes.render(77, size=(24, 32)).image, scenes.render(77, size=(24, 32), variety=True).image
        )


@pytest.mark.parametrize("kind", ["room", "street"])
def test_every_variety_changes_what_it_says(kind):
    """Built, not rendered: each addition alone, on a stage of its own."""
    before = stage_of(5, kind)
    for add in (variety._clutter, variety._thin, variety._people, variety._window_frame):
        stage = stage_of(5, kind)
        add(stage)
        assert len(stage.solids) > len(before.solids), add.__name__
        assert stage.camera.position == before.camera.position
        if stage.bounds and add is variety._people:
            added = stage.solids[len(before.solids) :]
            assert all(abs(s.centre[0]) < stage.bounds[0] and abs(s.centre[2]) < stage.bounds[2] for s in added)
    assert min(np.ptp(s.corners, axis=0).min() for s in _after(variety._thin, kind)) < 0.05
    assert max(np.ptp(s.corners, axis=0)[1] for s in _after(variety._people, kind)) > 0.5
    repeated, fog = stage_of(5, kind), stage_of(5, kind)
    variety._repeated(repeated)
    changed = [m for m, old in zip(repeated.materials, before.materials, strict=False) if m is not old]
    assert any(m.repeat <= 0.6 for m in changed) and len(repeated.solids) == len(before.solids)
    variety._fog(fog)
    assert 6 <= fog.haze <= 40
    dark = stage_of(5, kind)
    (variety._dim if dark.bounds else variety._night)(dark)
    assert sum(dark.ambient[0]) < 0.5 * sum(before.ambient[0])


def _after(add, kind):
    stage = stage_of(5, kind)
    old = len(stage.solids)
    add(stage)
    return stage.solids[old:]


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_compiled_loops_give_the_bits_of_the_torch_path(kind, monkeypatch):
    """Image, depth and sky, in views with and without variety."""
    pytest.importorskip("numba")
    fused = pytest.importorskip("distill.data.scenes.fused")
    assert backends.cpu_path() is fused.light_up
    asked = [dict(seed=31, size=(26, 35), kind=kind), dict(seed=24, size=(21, 30), kind=kind, variety=True)]
    compiled = [scenes.render_uncached(**what) for what in asked]
    monkeypatch.setattr(backends, "cpu_path", lambda: reference.light_up)
    for view, what in zip(compiled, asked, strict=True):
        again = scenes.render_uncached(**what)
        assert torch.equal(view.depth, again.depth) and torch.equal(view.valid, again.valid), what
        assert torch.equal(view.image, again.image), what


def test_a_lamp_shines_through_the_shade_that_it_hangs_in_on_both_paths():
    fused = pytest.importorskip("distill.data.scenes.fused")
    stage = stage_of(5, "table")
    lamp = next(light.place for light in stage.lights if not light.sun)
    _, plain = reference.light_up(stage, (20, 27))
    stage.add(ellipsoid(lamp, (0.2, 0.3, 0.2), 0), block(lamp, (0.3, 0.2, 0.3), 0))
    (depth, colour), (depth2, colour2) = reference.light_up(stage, (20, 27)), fused.light_up(stage, (20, 27))
    assert torch.equal(depth, depth2) and torch.equal(colour[:, 0], colour2[:, 0])
    assert colour.mean() > 0.8 * plain.mean()


def test_a_surface_that_touches_another_lies_in_its_shadow_on_both_paths():
    fused = pytest.importorskip("distill.data.scenes.fused")
    stage = under_a_block()
    (depth, colour), (depth2, colour2) = reference.light_up(stage, (19, 26)), fused.light_up(stage, (19, 26))
    assert torch.equal(depth, depth2) and torch.equal(colour[:, 0], colour2[:, 0])
    rows = [(float(depth[0, row, 13]), float(colour[0, 0, row].mean())) for row in range(11, 20)]  # of ground
    dark = [light for far, light in rows if 0.7 < far < 1.5]
    bright = [light for far, light in rows if 1.6 < far < 3]
    assert dark and bright and max(dark) < 0.5 * min(bright)


def test_a_stage_without_lights_has_its_ambient_light_on_both_paths():
    fused = pytest.importorskip("distill.data.scenes.fused")
    stage = stage_of(5, "table")
    stage.lights = []
    (depth, colour), (depth2, colour2) = reference.light_up(stage, (9, 12)), fused.light_up(stage, (9, 12))
    # The fused path leaves out the spare row and column of the centres, which no pixel reads.
    assert torch.equal(depth, depth2) and torch.equal(colour[:, 0], colour2[:, 0]) and colour.max() > 0
    assert torch.equal(colour[:, 1, :-1, :-1], colour2[:, 1, :-1, :-1])


@pytest.mark.parametrize(("numba", "warned"), [(None, False), ("broken", True)])
def test_without_numba_torch_casts_the_rays(numba, warned, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: numba)
    monkeypatch.setitem(sys.modules, "distill.data.scenes.fused", None)
    backends.cpu_path.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert backends.cpu_path() is reference.light_up
        assert bool(said) == warned
    finally:
        backends.cpu_path.cache_clear()


def test_odd_requests_are_refused():
    with pytest.raises(LookupError, match="room, corridor, street"):
        scenes.render(1, kind="space")
    with pytest.raises(ValueError, match="at least one pixel"):
        scenes.render(1, size=(0, 4))


def test_the_benchmark_is_fixed_and_apart_from_training(tmp_path, monkeypatch):
    drawn = functools.cache(scenes.render)
    monkeypatch.setattr(scenes, "render", drawn)
    monkeypatch.setattr(benchmark, "render", drawn)
    benchmark._view.cache_clear()
    assert scenes.BENCHMARK_SEEDS.stop <= scenes.TRAIN_SEEDS.start
    found = benchmark.samples(None)
    assert len(found) == len({s.key for s in found}) == benchmark.PROTOCOL.num_images == 64
    assert {s.group for s in found} == {"indoors", "outdoors"}
    wide = found[3]
    truth = wide.truth()
    assert wide.image().shape == (3, 192, 256) and truth.values.shape == (1, 192, 256)
    assert truth.kind == "metric_depth"
    assert wide.focal() == pytest.approx(8 * scenes.render(3, size=(8, 32)).focal) and wide.focal() > 100
    assert torch.equal(truth.values[0], scenes.render(3, size=(192, 256)).depth)
    assert not {s.key for s in benchmark.training_samples(64)} & {s.key for s in found}
    names = tmp_path / "list.txt"
    names.write_text(f"{found[9].key}\n{found[2].key}\n")
    assert [s.key for s in benchmark.samples("anything", names)] == [found[9].key, found[2].key]
    names.write_text("cellar_999.png\n")
    with pytest.raises(LookupError, match="cellar_999"):
        benchmark.samples(None, names)


def test_a_view_is_rendered_while_another_thread_stops_caching(monkeypatch):
    def last(seed, **options):
        monkeypatch.setattr(scenes, "_cache", None)
        return seed

    monkeypatch.setattr(scenes, "_cache", {})
    monkeypatch.setattr(scenes, "render_uncached", last)
    assert scenes.render(5) == 5
