"""Bodies of requests and responses, for validation and for OpenAPI."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

from cmmasksd.data.samples import is_blank
from cmmasksd.serving.settings import ServeSettings

NOT_BLANK = (
    r"[^\s\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
)
"""`is_blank` as a pattern for OpenAPI: a character that is neither white space nor invisible."""


class RLE(BaseModel):
    """A mask as COCO's compressed run lengths; pycocotools reads it."""

    size: Annotated[list[int], Field(min_length=2, max_length=2, description="[height, width] in pixels")]
    counts: str


class Map(BaseModel):
    """A map over the whole image, one byte per pixel, row by row."""

    width: int
    height: int
    data: Annotated[str, Field(description="base64 of width * height bytes")]


class Word(BaseModel):
    """A word of the sentence, and its correlation with the image."""

    text: str
    start: Annotated[int, Field(description="index of the first character in the sentence")]
    end: Annotated[int, Field(description="index after the last character")]
    map: Map | None


class SentenceResult(BaseModel):
    """The mask of one sentence."""

    text: str
    score: Annotated[float, Field(ge=0, le=1, description="mean probability over the mask; 0 if the mask is empty")]
    presence: Annotated[
        float, Field(ge=0, le=1, description="how sure the model is that the image holds what the sentence names")
    ]
    present: Annotated[bool, Field(description="whether presence is at least min_score; if not, the mask is empty")]
    area: Annotated[int, Field(ge=0, description="number of pixels in the mask")]
    box: Annotated[
        list[int] | None,
        Field(
            min_length=4,
            max_length=4,
            description="[x0, y0, x1, y1] in pixels, half-open: the mask lies in columns x0 to x1 - 1 and rows y0 to"
            " y1 - 1; null if the mask is empty",
        ),
    ]
    truncated: Annotated[
        bool, Field(description="the sentence exceeded the token limit of the model and lost its last words")
    ]
    rle: RLE | None = None
    png: Annotated[str | None, Field(description="base64 of a PNG at the image's size, white on black")] = None
    probability: Annotated[Map | None, Field(description="at most 512 pixels on the longer side")] = None
    words: list[Word] | None = None


class SegmentResponse(BaseModel):
    """Response of /v1/segment: one result per sentence, in order. Fields not named in `want` are left out."""

    width: int
    height: int
    threshold: float
    min_score: float
    results: list[SentenceResult]


class Health(BaseModel):
    """Response of /v1/health."""

    status: Literal["ok"]
    model: str
    version: str
    waiting: Annotated[int, Field(description="number of requests in the queue")]
    min_score: Annotated[float, Field(description="min_score of requests that do not give it")]
    limits: dict[str, float]


def _not_blank(sentence: str) -> str:
    if is_blank(sentence):
        raise PydanticCustomError("blank", "the sentence is blank: give at least one word")
    return sentence


def request_model(settings: ServeSettings) -> type[BaseModel]:
    """The fields of a request, with the limits of this server."""
    sentence = Annotated[
        str,
        StringConstraints(min_length=1, max_length=settings.max_characters, strict=True),
        AfterValidator(_not_blank),
        Field(json_schema_extra={"pattern": NOT_BLANK}),
    ]

    class SegmentRequest(BaseModel):
        model_config = ConfigDict(extra="forbid")
        image: Annotated[
            str,
            Field(
                description="base64 of a JPEG, PNG, WebP, BMP, GIF or TIFF file",
                json_schema_extra={"format": "byte", "contentEncoding": "base64"},
            ),
        ]
        sentences: Annotated[list[sentence], Field(min_length=1, max_length=settings.max_sentences)]  # pyright: ignore (its limits come from the settings)
        threshold: Annotated[float, Field(gt=0, lt=1, description="a pixel above this probability is in the mask")] = (
            0.5
        )
        min_score: Annotated[
            float, Field(ge=0, le=1, description="the mask of a sentence whose presence is below it is empty")
        ] = settings.min_score
        want: Annotated[
            list[Literal["rle", "png", "probability", "words"]],
            Field(max_length=4, description="optional fields of the results"),
        ] = ["rle"]

    return SegmentRequest


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's description of both kinds of body, which FastAPI cannot derive because it does not read them."""
    schema = model.model_json_schema()
    form = deepcopy(schema)
    form["properties"]["image"] = {
        "type": "string",
        "format": "binary",
        "contentMediaType": "application/octet-stream",
        "description": "a JPEG, PNG, WebP, BMP, GIF or TIFF file",
    }
    return {
        "required": True,
        "content": {"multipart/form-data": {"schema": form}, "application/json": {"schema": schema}},
    }
