"""Refusals: every one has the shape `{"error": {"code", "message"}}`."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException


class ErrorDetail(BaseModel):
    """The code is for programs, the message for people."""

    code: str
    message: str


class ErrorResponse(BaseModel):
    """Body of every refusal."""

    error: ErrorDetail


class Refusal(HTTPException):
    """An HTTP error with a code of this API."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(status, message, headers)
        self.code = code


STATUSES = {
    400: "the body is neither valid JSON, a form nor base64, or it ended too early",
    401: "the key is missing or wrong",
    403: "unknown host name, or the request was sent by a page of another site",
    408: "the request was sent too slowly",
    413: "too many bytes, or an image of too many pixels",
    415: "neither JSON nor a form, or the file is not an image",
    422: "a field is missing or outside its limits",
    429: "too many requests wait; see Retry-After",
    500: "internal error",
    503: "the server is shutting down or has too many connections",
    504: "the request exceeded its time limit and was dropped",
}


def openapi_refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for these statuses."""
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": STATUSES[status]} for status in statuses
    }
    if 429 in responses:
        responses[429]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return responses


def refusal_response(error: HTTPException) -> JSONResponse:
    """A refusal, or an error that starlette raised, as a response."""
    code = error.code if isinstance(error, Refusal) else HTTPStatus(error.status_code).name.lower()
    return JSONResponse({"error": {"code": code, "message": error.detail}}, error.status_code, error.headers)
