"""A conversation as a file, and the route that serves it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from pitlane.storage.db import Store
from pitlane.storage.errors import NotFound
from pitlane.storage.types import Refusal
from pitlane.ui import page_server
from pitlane.ui.export import export


def filled(store: Store) -> str:
    key = store.conversations.create("m").id
    store.conversations.append(key, "user", 'When is it\nopen? / ünd "so"')
    old = store.conversations.append(key, "assistant", "Never.")
    store.conversations.branch(key, old.id)
    stats = {"model": "m", "plugins": {"int8": {}}, "exactness": "approximate", "seed": 7, "tokens_per_second": 12.34}
    store.conversations.append(key, "assistant", "At **9**.", token_ids=[1, 2], stats=stats)
    refused = store.conversations.append(key, "user", "Why?")
    store.conversations.refuse(key, refused.id, Refusal("too long"))
    return key


def test_markdown_and_json_hold_the_shown_messages() -> None:
    with Store() as store:
        key = filled(store)
        text = export(store, key, "md")
        assert text.name == "when-is-it-open-nd-so.md" and "Never" not in text.text
        assert (
            "> When is it\n> open?" in text.text
            and "\n\nAt **9**.\n\n*m; int8; approximate; seed 7, 12.3 tok/s*" in text.text
        )
        assert text.text.endswith("> Why?\n\n*No answer: too long*\n")
        whole = json.loads(export(store, key, "json").text)
        assert [message["role"] for message in whole["messages"]] == ["user", "assistant", "user"]
        assert whole["messages"][1]["token_ids"] == [1, 2] and whole["messages"][1]["stats"]["seed"] == 7
        assert whole["messages"][2]["refusal"]["reason"] == "too long"
        for wrong in ((key, "exe"), ("gone", "md")):
            with pytest.raises(NotFound):
                export(store, *wrong)


def test_the_server_hands_out_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server.gr, "mount_gradio_app", lambda parent, *args, **kwargs: parent)

    class Page:
        app_id = 1

        def queue(self, **options: object) -> SimpleNamespace:
            return SimpleNamespace(_queue=SimpleNamespace())

    with Store() as store:
        key = filled(store)
        client = TestClient(page_server._app(Page(), dict, store))
        answer = client.get(f"/pitlane/export/{key}.md")
        assert (
            answer.status_code == 200 and 'filename="when-is-it-open-nd-so.md"' in answer.headers["content-disposition"]
        )
        assert client.get(f"/pitlane/export/{key}.json").json()["id"] == key
        assert client.get("/pitlane/export/gone.md").status_code == 404
