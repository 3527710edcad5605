"""One call for all forms of the fusion, the form that a configuration names, and what each form refuses."""

import pytest
import torch

from engram_ref.fusion import DemoFusion, ShortConvHistory
from engram_ref.fusion.factory import make_fusion
from engram_ref.fusion.v41 import V41Fusion
from tests.ref.fusion.v41_cases import make_config, make_dead, make_fusion_v41, make_inputs


def test_both_forms_add_to_the_stream():
    config = make_config()
    fusion = make_fusion_v41(config)
    e, hidden = make_inputs(config, 2, 5)
    dead = make_dead(2, 5)
    assert torch.equal(fusion.add_to(hidden, e, dead=dead), fusion(e, hidden, dead))
    demo = DemoFusion(config.replace(form="demo", kernel_size=4), dtype=torch.float64)
    history, past = ShortConvHistory(demo, 2), ShortConvHistory(demo, 2)
    assert torch.equal(demo.add_to(hidden, e, history), hidden + demo(e, hidden, past))
    assert torch.equal(history.values, past.values) and past.values.any()


def test_each_form_refuses_what_it_does_not_know():
    config = make_config()
    demo = DemoFusion(config.replace(form="demo"), dtype=torch.float64)
    e, hidden = make_inputs(config, 2, 5)
    with pytest.raises(ValueError, match="the demo's form knows none; leave dead out, or use form v41"):
        demo.add_to(hidden, e, dead=make_dead(2, 5))
    with pytest.raises(ValueError, match="no convolution to carry on; leave history out"):
        make_fusion_v41(config).add_to(hidden, e, ShortConvHistory(demo, 2))


def test_the_configuration_picks_the_form():
    config = make_config()
    for fp8_weights in (False, True):
        fusion = make_fusion(config, "cpu", torch.bfloat16, fp8_weights)
        assert isinstance(fusion, V41Fusion) and fusion.dtype == torch.bfloat16
        assert ("wkv.scale" in fusion.state_dict()) == fp8_weights
    assert isinstance(make_fusion(config.replace(form="demo")), DemoFusion)
    with pytest.raises(ValueError, match="fp8=True: form demo has no fp8 weights"):
        make_fusion(config.replace(form="demo"), fp8=True)
    for kind, form in ((V41Fusion, "demo"), (DemoFusion, "v41")):
        with pytest.raises(ValueError, match=f"a configuration of form '{form}'; .* let make_fusion pick the class"):
            kind(config.replace(form=form))
