"""What llama.cpp's server says about itself, so that its clients configure themselves: health, props, tokens."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import StrictBool, StrictInt, StrictStr

from ktcompile.generate import encode
from ktcompile.server.errors import ApiError
from ktcompile.server.prompt import prompt_of
from ktcompile.server.requests import Body, ChatRequest
from ktcompile.server.state import State

router = APIRouter()


class TokenizeRequest(Body):
    """`POST /tokenize`."""

    content: StrictStr = ""
    add_special: StrictBool = False
    parse_special: StrictBool = True


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    tokens: list[StrictInt]


def state_of(request: Request) -> State:
    """The server's state."""
    found: State = request.app.state.served
    return found


@router.get("/health")
@router.get("/v1/health")
async def health(request: Request) -> JSONResponse:
    """200 {"status": "ok"} once the model is there; before that 503 with how far it is."""
    try:
        state_of(request).ready()
    except ApiError as error:
        what, done, total = state_of(request).progress
        progress = {"what": what, "done": done, "total": total}
        return JSONResponse(error.json() | {"status": error.code, "progress": progress}, error.status)
    return JSONResponse({"status": "ok"})


@router.get("/v1/models")
@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model, with what llama.cpp's clients look for in `meta`."""
    state = state_of(request)
    state.ready()
    meta = {"n_ctx_train": state.context, "n_ctx": state.context, "n_vocab": len(state.tokenizer)}
    model = {"id": state.name, "object": "model", "created": int(state.started), "owned_by": "ktrans", "meta": meta}
    return {"object": "list", "data": [model], "models": [{"name": state.name, "model": state.name}]}


@router.get("/props")
async def props(request: Request) -> dict[str, Any]:
    """Context, template and defaults."""
    state = state_of(request)
    state.ready()
    d = state.default
    params = {"temperature": d.temperature, "top_p": d.top_p, "top_k": d.top_k, "min_p": d.min_p}
    return {
        "default_generation_settings": {"n_ctx": state.context, "params": params},
        "total_slots": state.engine.schedule.max_batch,
        "model_path": state.name,
        "model_alias": state.name,
        "chat_template": state.tokenizer.chat_template or "",
        "bos_token": state.tokenizer.bos_token or "",
        "eos_token": state.tokenizer.eos_token or "",
        "modalities": {"vision": False, "audio": False},
    }


@router.post("/tokenize")
async def tokenize(request: Request, given: TokenizeRequest) -> dict[str, list[int]]:
    """Ids of a text."""
    state = state_of(request)
    state.ready()
    how = {"plain": not given.parse_special, "add_special": given.add_special}
    return {"tokens": await asyncio.to_thread(encode, state.tokenizer, given.content, **how)}


@router.post("/detokenize")
async def detokenize(request: Request, given: DetokenizeRequest) -> dict[str, str]:
    """Text of ids."""
    state = state_of(request)
    state.ready()
    most = len(state.tokenizer)
    if bad := [t for t in given.tokens if not 0 <= t < most]:
        raise ApiError(400, f"token {bad[0]}: ids are 0 to {most - 1}", param="tokens", code="invalid_value")
    return {"content": state.tokenizer.decode(given.tokens)}


@router.post("/apply-template")
async def apply_template(request: Request, given: ChatRequest) -> dict[str, str]:
    """The prompt that a conversation becomes."""
    state = state_of(request)
    state.ready()
    prompt = await asyncio.to_thread(prompt_of, state, given.plain(), given.may_call())
    return {"prompt": state.tokenizer.decode(prompt.ids)}


__all__ = ["router", "state_of"]
