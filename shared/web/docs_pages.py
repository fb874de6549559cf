"""`/docs` and `/redoc` without the internet: what FastAPI's pages load comes from a package of this server's."""

from importlib.resources import files

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

ASSETS = "/docs-assets"


def add_docs_pages(app: FastAPI) -> None:
    """For an app whose own pages are off. Its OpenAPI document is at `app.openapi_url`."""
    assert app.openapi_url is not None
    document, title, icon = app.openapi_url, app.title, f"{ASSETS}/favicon.png"
    app.mount(ASSETS, StaticFiles(directory=str(files("fastapi_offline") / "static")))

    @app.get("/docs", include_in_schema=False)
    async def swagger_ui() -> HTMLResponse:
        script, style = f"{ASSETS}/swagger-ui-bundle.js", f"{ASSETS}/swagger-ui.css"
        return get_swagger_ui_html(
            openapi_url=document, title=title, swagger_js_url=script, swagger_css_url=style, swagger_favicon_url=icon
        )

    @app.get("/redoc", include_in_schema=False)
    async def redoc() -> HTMLResponse:
        script = f"{ASSETS}/redoc.standalone.js"
        return get_redoc_html(
            openapi_url=document, title=title, redoc_js_url=script, redoc_favicon_url=icon, with_google_fonts=False
        )
