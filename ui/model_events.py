"""Events of the model menu. `Handlers` is the `Front` of the model switch: it says when no answer is running."""

from __future__ import annotations

from collections.abc import Iterator

from pitlane import ModelError
from pitlane.ui.model_menu import panels
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_event import Changes, page_event
from pitlane.ui.page_view import View
from pitlane.ui.render import short_name


class ModelEvents(View):
    """Events of the model menu, over one desk."""

    @page_event
    def look(self) -> Iterator[Changes]:
        """Open the menu: the models at once, then with their memory."""
        for html in panels(self.switch):
            yield {self.ui.models: html}

    @page_event
    def choose(self, event: gr.EventData) -> Changes:
        """Change to a model of the menu, or to the model that the first screen offers."""
        self.switch.choose(str(event.id))
        return {}

    @page_event
    def choose_named(self, name: str) -> Changes:
        """Change to the model in the text field."""
        self.switch.choose(name)
        return {}

    @page_event
    def cancel(self) -> Changes:
        """Keep the old model."""
        self.switch.cancel()
        return {}

    # ---- the front of the switch

    def retire(self) -> bool:
        """Accept no more questions if no answer is running, and return whether that is so."""
        with self.lock:
            if self.writing:
                return False
            self.is_retired = True
        for session in list(self.shown):
            self.desk.stop((session, "reading"))
        return True

    def reopen(self) -> None:
        """Accept questions again."""
        self.is_retired = False

    def check_open(self) -> None:
        """Raise ModelError if the model is about to change."""
        if not self.is_retired:
            return
        change = self.switch.running
        if change is not None:
            raise ModelError(f"{short_name(change.name)} takes over in a moment; your question stays in the box")
        raise ModelError("no model is loaded; choose a model in the header")
