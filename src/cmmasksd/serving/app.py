"""The HTTP API and the page as one FastAPI application; server.py runs it on uvicorn.

    POST /v1/segment    an image and sentences -> masks, scores, boxes (multipart/form-data or application/json)
    GET  /v1/health     readiness, model, limits
    GET  /metrics       for Prometheus
    GET  /openapi.json  the schema of the API
    GET  /page/         the web page

Neither images nor sentences are logged or stored.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cmmasksd import __version__
from cmmasksd.data.images import ImageTooLarge
from cmmasksd.errors import UserError
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.serving.body import read_job
from cmmasksd.serving.engine import Busy, Engine, Stopped
from cmmasksd.serving.metrics import Metrics
from cmmasksd.serving.middleware import HEADERS, HEALTH, Gate, Headers
from cmmasksd.serving.refusals import Refusal, openapi_refusals, refusal_response
from cmmasksd.serving.schemas import Health, SegmentResponse, request_body, request_model
from cmmasksd.serving.settings import ServeSettings, checked_key
from cmmasksd.serving.shares import Shares, address_of

PAGE = Path(__file__).parent / "page"


def create_app(
    segmenter: Segmenter, name: str, settings: ServeSettings | None = None, key: str | None = None
) -> FastAPI:
    """The application.

    Args:
        segmenter: the model; from now on used by one thread of the application only.
        name: name of the model, shown to clients.
        settings: limits.
        key: key that clients must send, see `Gate`; None: no key is required.

    Raises:
        UserError: the key is one that no client can send.
    """
    settings, key = settings or ServeSettings(), checked_key(key)
    metrics = Metrics()
    engine = Engine(segmenter, settings, metrics.count_batch)
    metrics.watch_queue(lambda: engine.waiting)
    held_bytes, model = Shares(settings.max_held), request_model(settings)

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
    app.add_middleware(Gate, settings=settings, key=key)
    app.add_middleware(Headers)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return refusal_response(error)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return refusal_response(_internal_error(**HEADERS))  # this handler runs outside of the middleware

    async def segment(request: Request) -> JSONResponse:
        address, held = address_of(request.scope), 0

        def hold(size: int) -> None:
            nonlocal held
            if not held_bytes.take(address, size):
                raise Busy
            held += size

        try:
            engine.check()
            job = await read_job(request, settings, model, hold)
            return JSONResponse(await _result(request, engine.submit(job), settings.timeout))
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
            held_bytes.release(address, held)

    # for OpenAPI only: Gate checks the key
    security = [Security(APIKeyHeader(name="X-API-Key", auto_error=False)), Security(HTTPBearer(auto_error=False))]
    keys, key_refusal = (security, [401]) if key else ([], [])

    @app.post(
        "/v1/segment",
        response_model=SegmentResponse,
        dependencies=keys,
        responses=openapi_refusals(*key_refusal, 400, 403, 408, 413, 415, 422, 429, 500, 503, 504),
        openapi_extra={"requestBody": request_body(model)},
        summary="Segment what sentences name in an image",
    )
    async def counted_segment(request: Request) -> Any:
        started, status = time.monotonic(), 500
        try:
            response = await segment(request)
            status = response.status_code
            return response
        except Refusal as error:
            status = error.status_code
            raise
        finally:
            metrics.count_request(status, time.monotonic() - started)

    @app.get(HEALTH, response_model=Health, responses=openapi_refusals(403, 503), summary="Readiness, model and limits")
    async def health() -> Any:
        try:
            with suppress(Busy):
                engine.check()
        except Stopped:
            raise Refusal(503, "stopping", "the server is shutting down") from None
        limits = {
            limit: getattr(settings, limit)
            for limit in ("max_bytes", "max_pixels", "max_sentences", "max_characters", "timeout")
        }
        state = {"status": "ok", "model": name, "version": __version__, "waiting": engine.waiting}
        return state | {"min_score": settings.min_score, "limits": limits}

    @app.get(
        "/metrics",
        response_class=Response,
        dependencies=keys,
        responses={200: {"content": {"text/plain": {}}}, **openapi_refusals(*key_refusal, 403, 503)},
        summary="Metrics",
    )
    async def prometheus() -> Response:
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("page/")

    app.mount("/page", StaticFiles(directory=PAGE, html=True))
    return app


async def _result(request: Request, future: Future[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Wait for the engine. If the client leaves or the time is up, the future is cancelled and the engine drops it."""
    waiting = asyncio.wrap_future(future)
    disconnected = asyncio.ensure_future(request.receive())  # the body has been read: only the disconnect can follow
    try:
        await asyncio.wait({waiting, disconnected}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if disconnected.done():
            raise ClientDisconnect
        raise Refusal(504, "too_late", f"dropped: not computed within {seconds:g} s")
    except (UserError, Stopped, ClientDisconnect, Refusal):
        raise
    except Exception:  # logged by the engine, without the message, which may hold a sentence
        raise _internal_error() from None
    finally:
        waiting.cancel()
        disconnected.cancel()


def _internal_error(**headers: str) -> Refusal:
    return Refusal(500, "internal", "internal error; see the log of the server", **headers)
