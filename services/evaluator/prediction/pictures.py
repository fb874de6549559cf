"""The images of a prediction request, read by the route itself: its key is checked before the body is taken."""

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from shared.errors import InvalidInput, TooLarge

FIELD = "images"


async def read_pictures(request: Request, max_files: int, max_bytes: int) -> tuple[list[str], list[bytes]]:
    """File names, and their contents. Raises InvalidInput where the form holds no image or something else, TooLarge
    beyond the limits."""
    try:
        form = await request.form(max_files=max_files + 1, max_fields=0)
    except HTTPException as error:  # how Starlette refuses a form
        raise InvalidInput(
            f"the body is not form data with at most {max_files} files '{FIELD}' and nothing else ({error.detail}); "
            "send it as multipart/form-data",
            code="unreadable_form",
            param=FIELD,
        ) from error
    try:
        parts = [part for field, part in form.multi_items() if field == FIELD and isinstance(part, UploadFile)]
        if not parts or len(parts) != len(form.multi_items()):
            raise InvalidInput(
                f"the form must hold files named '{FIELD}', at least one, and nothing else",
                code="no_images",
                param=FIELD,
            )
        if len(parts) > max_files or sum(part.size or 0 for part in parts) > max_bytes:
            raise TooLarge(
                f"a request may hold {max_files} images of {max_bytes} bytes together; send several requests",
                code="too_many_images",
                param=FIELD,
            )
        return [part.filename or "" for part in parts], [await part.read() for part in parts]
    finally:
        await form.close()
