"""The zoo as tests: a sample, and ``python -m pytest -m zoo -n 2`` for all; ``python tests/zoo.py`` prints a table."""

from __future__ import annotations

import pytest

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from zoo import FINE, MISSING, check, run  # noqa: E402
from zoo_cases import CASES  # noqa: E402

NAMED = {case.name: case for case in CASES}
# Small and of many kinds: mixers of tokens and channels, post-norm, macaron and scaled residuals, several trunks,
# projections, gates, two streams, graphs, outputs that are dataclasses; two hold nothing to convert. Rebuilt from
# papers: sparse buffers, a mixed trunk, two representations, parts of the batch, layers dropped, subtractions.
SAMPLE = """
timm:test_vit timm:test_vit_relpos timm:test_mambaout timm:mobilenetv3_small_050 timm:repghostnet_050
timm:starnet_s050 timm:convnext_zepto_rms timm:regnetx_002 timm:lcnetv2_small timm:efficientvit_m0
torchvision:shufflenet_v2_x0_5 torchvision:mnasnet0_5 torchvision:mobilenet_v3_small
x_transformers:post_norm x_transformers:macaron x_transformers:scale_residual_constant
x_transformers:value_residual x_transformers:gate_residual
vit_pytorch:parallel_vit vit_pytorch:cait vit_pytorch:cct
diffusers:unet2d diffusers:dit
torch_geometric:deepgcn_res+ torch_geometric:deepgcn_res
rebuilt:whisper:graph rebuilt:whisper_scores:blocks rebuilt:nanogpt_loss:graph rebuilt:nanochat:graph
rebuilt:nanochat_loss:blocks rebuilt:evoformer:graph rebuilt:evoformer:blocks rebuilt:dinov2_drop_path:graph
rebuilt:dinov2_masked:graph rebuilt:dinov2_subset:blocks rebuilt:clip:blocks rebuilt:conformer:graph
rebuilt:conformer_drop:blocks rebuilt:nbeats:graph rebuilt:nbeats:blocks
""".split()


@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_zoo(name):
    outcome = check(NAMED[name])
    if outcome.status == MISSING:
        pytest.skip(outcome.message)
    assert outcome.status in FINE, outcome.message


@pytest.mark.zoo
@pytest.mark.parametrize("name", list(NAMED))
def test_zoo(name):
    outcome = run(name)
    if outcome.status == MISSING:
        pytest.skip(outcome.message)
    assert outcome.status in FINE, outcome.message
