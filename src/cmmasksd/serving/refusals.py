"""Refusals: every one has the shape `{"error": {"code", "message"}}`."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel


class Problem(BaseModel):
    """What is wrong, for programs and for people."""

    code: str
    message: str


class Refused(BaseModel):
    """The body of every refusal."""

    error: Problem


class Refusal(Exception):
    """A refusal on its way out."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


REFUSALS = {
    400: "the body is broken: no JSON, no form, no base64, or it ended too early",
    401: "the key is missing or wrong",
    403: "the server does not answer to this host name, or a page of another site sent the request",
    408: "the request was sent too slowly",
    413: "too many bytes, or an image of too many pixels",
    415: "neither JSON nor a form, or a file that is no image",
    422: "a field is missing or outside its limits",
    429: "too many requests wait; see Retry-After",
    500: "a mistake in the server",
    503: "the server is shutting down or has too many connections",
    504: "the request was not done in time and was dropped",
}


def documented(*codes: int) -> dict[int | str, dict[str, Any]]:
    shown: dict[int | str, dict[str, Any]] = {code: {"model": Refused, "description": REFUSALS[code]} for code in codes}
    if 429 in shown:
        shown[429]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return shown


def refusal_response(status: int, code: str, message: str, headers: dict[str, str]) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)
