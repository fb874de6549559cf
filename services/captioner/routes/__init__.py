"""The captioner's REST routes; chat completions, in OpenAI's shape, are in services/captioner/serving/chat.py."""

from fastapi import APIRouter

from services.captioner.routes import caption_jobs, captions, datasets, transfer

router = APIRouter(prefix="/v1", tags=["captioner"])
for part in (datasets, transfer, caption_jobs, captions):
    router.include_router(part.router)
