"""What most tests of an attached model begin with: a model, layers of both forms, token ids."""

import pytest

from tests.ref.attach.models import make_ids, make_layers, make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module", params=["demo", "v41"])
def layers(request):
    return make_layers(form=request.param)


@pytest.fixture(scope="module")
def ids():
    return make_ids()
