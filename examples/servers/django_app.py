r"""Django behind gunicorn, the whole site in one file.

    takeover run --listen tcp://127.0.0.1:8000 -- \
        gunicorn django_app:app --worker-class gthread --threads 32 --graceful-timeout 25

Started again, it is the deploy.
"""

from __future__ import annotations

import os

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path

settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="for this example")


def which(_request: HttpRequest) -> HttpResponse:
    """Says which process it is, so that a deploy can be seen."""
    return HttpResponse(f"{os.getpid()}\n", content_type="text/plain")


urlpatterns = [path("", which)]
app = get_wsgi_application()
