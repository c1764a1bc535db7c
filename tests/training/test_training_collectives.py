"""Collectives read from a program's text: written by hand, and compiled for eight devices."""

import json
import subprocess
import sys

from programs import on_devices

from oasis_jax.training.collectives import collectives

PROGRAM = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[3,5])) -> (s32[], bf16[3,5]) {
  %p = (s32[], bf16[3,5]{1,0}) parameter(0)
  %move = bf16[3,5]{1,0:T(8,128)(2,1)} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
}

%outer (q: (s32[], bf16[3,5])) -> (s32[], bf16[3,5]) {
  %q = (s32[], bf16[3,5]{1,0}) parameter(0)
  %loop = (s32[], bf16[3,5]{1,0}) while(%q), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"4"}}
  %all = f32[7,11]{1,0} all-gather(%y), channel_id=2, dimensions={0}
}

%less (r: (s32[], bf16[3,5])) -> pred[] {
  %r = (s32[], bf16[3,5]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%below (r: (s32[], bf16[3,5])) -> pred[] {
  %r = (s32[], bf16[3,5]{1,0}) parameter(0)
  %bound.1 = s32[]{:T(128)} constant(7)
  %counter = s32[]{:T(128)} get-tuple-element(%r), index=0
  ROOT %less_than = pred[]{:T(512)} compare(%counter, %bound.1), direction=LT
}

%begin (u: bf16[2,2]) -> bf16[4,2] {
  ROOT %part.1 = bf16[4,2]{1,0} all-gather(%u), channel_id=9, frontend_attributes={chain_id="0"}
}

%go_on (u: bf16[2,2]) -> bf16[4,2] {
  ROOT %part.2 = bf16[4,2]{1,0} all-gather(%u), channel_id=9, frontend_attributes={chain_id="0"}
}

%spread (p: (s32[], bf16[3,5])) -> (s32[], bf16[3,5]) {
  %first = bf16[4,2]{1,0} fusion(%x), kind=kCustom, calls=%begin
  %second = bf16[4,2]{1,0} fusion(%x), kind=kCustom, calls=%go_on
  %sum.1 = f32[3]{0} reduce-scatter(%y), to_apply=%add
}

ENTRY %main (s: f32[2]) -> f32[2] {
  %s = f32[2]{0} parameter(0)
  %steps = (s32[], bf16[3,5]{1,0}) while(%t), condition=%less, body=%outer, \
  backend_config={"known_trip_count":{"n":"3"}}
  %unknown = (s32[], bf16[3,5]{1,0}) while(%t), condition=%less, body=%inner
  %counted = (s32[], bf16[3,5]{1,0}) while(%t), condition=%below, body=%spread
  %sums = (f32[2]{0}, f32[2]{0}, f32[2]{0}, f32[2]{0}, f32[2]{0}, /*index=5*/f32[13]{0}) \
  all-reduce(%s, %s), to_apply=%add
  %begun = (f32[17]{0}, f32[19]{0}) all-reduce-start(%s, %s), to_apply=%add
  %done = (f32[17]{0}, f32[19]{0}) all-reduce-done(%begun)
  %many = ((f32[1,2]{1,0}, s8[3]{0}), (f32[8,2]{1,0}, s8[24]{0})) all-gather-start(%s, %s), dimensions={0}
  %whole = (f32[8,2]{1,0}, s8[24]{0}) all-gather-done(%many)
  ROOT %end = f32[2]{0} copy(%s)
}
"""


def test_loops_tuples_and_asynchronous_starts_count_as_often_as_they_run():
    found = {kind.name: (kind.count, kind.bytes) for kind in collectives(PROGRAM)}
    assert found == {
        "collective-permute": (3 * 4 + 1, (3 * 4 + 1) * 3 * 5 * 2),
        "all-gather": (3 + 1 + 7, 3 * 7 * 11 * 4 + 8 * 2 * 4 + 24 + 7 * 4 * 2 * 2),
        "reduce-scatter": (7, 7 * 3 * 4),
        "all-reduce": (2, (5 * 2 + 13) * 4 + (17 + 19) * 4),
    }


COMPILED = """
import json, jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from oasis_jax.training.collectives import collectives

mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

def body(x, w):
    def layer(x, w):
        return jnp.tanh(x @ jax.lax.all_gather(w, "x", tiled=True)), None
    x = jax.lax.scan(layer, x, w)[0]
    return jax.lax.psum(x, "x")

step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(P("x"), P(None, "x")), out_specs=P(), check_vma=False))
text = step.lower(jnp.zeros((8 * 3, 16)), jnp.zeros((5, 16, 16))).compile().as_text()
print(json.dumps({kind.name: (kind.count, kind.bytes) for kind in collectives(text)}))
"""


def test_a_program_compiled_for_eight_devices_has_the_collectives_that_were_written():
    environment = on_devices(8)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    # Five layers gather a float32 matrix of 16 x 16 each; one sum of 3 x 16.
    assert json.loads(done.stdout) == {"all-gather": [5, 5 * 16 * 16 * 4], "all-reduce": [1, 3 * 16 * 4]}
