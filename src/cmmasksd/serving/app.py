"""The HTTP API and the page, as one FastAPI application; server.py puts it behind uvicorn.

    POST /v1/segment    an image and sentences -> masks, scores, boxes (multipart/form-data or application/json)
    GET  /v1/health     is it ready, which model, which limits
    GET  /metrics       for Prometheus
    GET  /openapi.json  all of this for machines
    GET  /page/         the web page

Every refusal has one shape, `{"error": {"code", "message"}}`. Neither images nor sentences are logged or kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cmmasksd import __version__
from cmmasksd.data.images import ImageTooLarge
from cmmasksd.errors import UserError
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.serving.body import read_job
from cmmasksd.serving.engine import Busy, Engine, Stopped
from cmmasksd.serving.middleware import HEADERS, HEALTH, Gate, Headers
from cmmasksd.serving.refusals import Refusal, documented, refusal_response
from cmmasksd.serving.schemas import Answer, Health, request_body, request_model
from cmmasksd.serving.settings import ServeSettings, checked_key
from cmmasksd.serving.shares import Shares, address_of

PAGE = Path(__file__).parent / "page"


def create_app(
    segmenter: Segmenter, name: str, settings: ServeSettings | None = None, key: str | None = None
) -> FastAPI:
    """The application.

    Args:
        segmenter: the model; used by one thread of the application alone from now on.
        name: of the model, to show.
        settings: limits.
        key: which clients must send, see `Gate`; None lets everybody in.

    Raises:
        UserError: for a key that no client can send.
    """
    settings, key = settings or ServeSettings(), checked_key(key)
    registry = CollectorRegistry()
    answered = Counter("cmmasksd_requests", "Requests to /v1/segment by status", ["status"], registry=registry)
    taken = Histogram("cmmasksd_request_seconds", "From the request's head to its answer", registry=registry)
    together = Histogram(
        "cmmasksd_batch_requests", "Requests computed together", buckets=[1, 2, 4, 8, 16, 32], registry=registry
    )
    computing = Histogram("cmmasksd_batch_seconds", "Time of a batch", registry=registry)
    sentences = Counter("cmmasksd_sentences", "Sentences computed", registry=registry)

    def observe(requests: int, said: int, seconds: float) -> None:
        together.observe(requests)
        sentences.inc(said)
        computing.observe(seconds)

    engine = Engine(segmenter, settings, observe)
    Gauge("cmmasksd_waiting", "Requests in the queue", registry=registry).set_function(lambda: engine.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="CM-MaskSD",
        version=__version__,
        description="Type a sentence, get the mask of the object it names.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.engine = engine
    model = request_model(settings)

    bodies = Shares(settings.max_held)
    app.add_middleware(Gate, settings=settings, key=key)
    app.add_middleware(Headers)

    @app.exception_handler(Refusal)
    async def refusal(_: Request, error: Refusal) -> JSONResponse:
        return refusal_response(error.status, error.code, error.message, error.headers)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        return refusal_response(error.status_code, code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def mistake(_: Request, error: Exception) -> JSONResponse:
        return refusal_response(500, "internal", "the server made a mistake; it is in its log", HEADERS)

    async def segment(request: Request) -> JSONResponse:
        address, held = address_of(request.scope), 0

        def hold(size: int) -> None:
            nonlocal held
            if not bodies.take(address, size):
                raise Busy
            held += size

        try:
            engine.check()
            job = await read_job(request, settings, model, hold)
            return JSONResponse(await _answer(request, engine.submit(job), settings.timeout))
        except Busy:
            raise Refusal(429, "busy", "too many requests wait: try again", **{"Retry-After": "1"}) from None
        except Stopped:
            raise Refusal(503, "stopping", "the server is shutting down", **{"Retry-After": "10"}) from None
        except ImageTooLarge as error:
            raise Refusal(413, "too_many_pixels", str(error)) from None
        except UserError as error:
            raise Refusal(415, "no_image", str(error)) from None
        except ClientDisconnect:
            raise Refusal(400, "truncated", "the request ended too early") from None
        finally:
            bodies.give_back(address, held)

    # for OpenAPI only: Gate reads the key
    schemes = (APIKeyHeader(name="X-API-Key", auto_error=False), HTTPBearer(auto_error=False))
    keys, asked = ([Security(one) for one in schemes], [401]) if key else ([], [])

    @app.post(
        "/v1/segment",
        response_model=Answer,
        dependencies=keys,
        responses=documented(*asked, 400, 403, 408, 413, 415, 422, 429, 500, 503, 504),
        openapi_extra={"requestBody": request_body(model)},
        summary="Find what sentences name in an image",
    )
    async def counted(request: Request) -> Any:
        started, status = time.monotonic(), 500
        try:
            answer = await segment(request)
            status = answer.status_code
            return answer
        except Refusal as error:
            status = error.status
            raise
        finally:
            answered.labels(str(status)).inc()
            taken.observe(time.monotonic() - started)

    @app.get(HEALTH, response_model=Health, responses=documented(403, 503), summary="Is it ready, and what may I ask")
    async def health() -> Any:
        try:
            engine.check()
        except Busy:
            pass
        except Stopped:
            raise Refusal(503, "stopping", "the server is shutting down") from None
        limits = {
            limit: getattr(settings, limit)
            for limit in ("max_bytes", "max_pixels", "max_sentences", "max_characters", "timeout")
        }
        return {"status": "ok", "model": name, "version": __version__, "waiting": engine.waiting, "limits": limits}

    @app.get(
        "/metrics",
        response_class=Response,
        dependencies=keys,
        responses={200: {"content": {"text/plain": {}}}, **documented(*asked, 403, 503)},
        summary="Metrics",
    )
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("page/")

    app.mount("/page", StaticFiles(directory=PAGE, html=True))
    return app


async def _answer(request: Request, future: Future[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Wait for the engine; a cancelled future is work that it drops."""
    waiting = asyncio.wrap_future(future)
    # the body has been read, so what comes is the end of the connection
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({waiting, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if gone.done():
            raise ClientDisconnect
        raise Refusal(504, "too_late", f"not done in {seconds:g} s, so it was dropped")
    except (UserError, Stopped, ClientDisconnect, Refusal):
        raise
    except Exception:  # the engine's log says where; its message may hold a sentence
        raise Refusal(500, "internal", "the server made a mistake; it is in its log") from None
    finally:
        waiting.cancel()
        gone.cancel()
