"""schemathesis sends what OpenAPI allows and what it forbids; the server does what OpenAPI says.

Images come from the test (JSON Schema cannot say "base64 of an image"); every other value is schemathesis's.
"""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.specs.openapi.checks import negative_data_rejection

from cmmasksd.data.samples import is_blank
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.serving.settings import ServeSettings

EXAMPLES = 25  # of each operation, of each kind


def _image(mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (9, 7)).save(file, "PNG")
    return file.getvalue()


IMAGES = [_image(mode) for mode in ("RGB", "L", "RGBA")]
schemathesis.openapi.format("byte", st.sampled_from([base64.b64encode(image).decode() for image in IMAGES]))
schemathesis.openapi.format("binary", st.sampled_from(IMAGES))


@pytest.fixture(scope="module")
def schema(running, tiny_model_folder: Path) -> Iterator:
    segmenter = Segmenter.from_pretrained(tiny_model_folder, device="cpu")
    with running(segmenter, "tiny", ServeSettings(port=0, timeout=120), "key") as (host, port, _):
        yield schemathesis.openapi.from_url(f"http://{host}:{port}/openapi.json")


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("path", "mode"),
    [("/v1/segment", POSITIVE), ("/v1/segment", NEGATIVE), ("/v1/health", POSITIVE), ("/metrics", POSITIVE)],
)
def test_the_server_does_what_openapi_says(schema, path: str, mode: schemathesis.GenerationMode):
    operation = schema[path]["post" if path == "/v1/segment" else "get"]
    seen = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case) -> None:
        # Whether forbidden values are refused is judged here: in a form they may be sent as allowed ones.
        answer = case.call_and_validate(headers={"X-API-Key": "key"}, excluded_checks=[negative_data_rejection])
        seen.append(answer.status_code)
        if mode is NEGATIVE and answer.status_code == 200 and path == "/v1/segment":
            assert case.body.keys() <= {"image", "sentences", "threshold", "min_score", "want"}
            assert case.body["sentences"]
            assert not any(is_blank(str(sentence)) for sentence in case.body["sentences"])
            assert 0 < float(case.body.get("threshold", 0.5)) < 1
            assert 0 <= float(case.body.get("min_score", 0)) <= 1

    check()
    if path == "/v1/segment":  # a broken second header beside the right key is no mistake, so NEGATIVE may see a 200
        assert (200 if mode is POSITIVE else 422) in seen


def test_every_operation_is_tested(schema):
    assert {operation.ok().path for operation in schema.get_all_operations()} == {
        "/v1/segment",
        "/v1/health",
        "/metrics",
    }
