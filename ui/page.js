/* What the page does in the browser alone: buttons in lists and messages become events of their Gradio component
   (`act`), the thread follows the answer, light or dark, side panels on narrow screens, files dropped anywhere. */
(() => {
  const frame = () => document.getElementById("frame").classList;  // Gradio scopes the style sheet below body
  const confirming = new Set(["remove", "discard"]);
  const action = (label, css, run) => {
    const button = document.createElement("button");
    button.type = "button"; button.textContent = label; button.className = css; button.addEventListener("click", run);
    return button;
  };
  const editor = (host, text, label, done) => {
    const field = document.createElement("textarea"), actions = document.createElement("div"), box = document.createElement("div");
    field.value = text; field.rows = 1; field.className = "inline-editor"; field.setAttribute("aria-label", label);
    const kept = [...host.children].map((child) => [child, child.style.display]);
    kept.forEach(([child]) => (child.style.display = "none"));
    let open = true;  // removing a field that has the focus blurs it, which comes back here
    const close = () => { if (!open) return; open = false; box.remove(); kept.forEach(([child, display]) => (child.style.display = display)); };
    const save = () => { const value = field.value; close(); done(value); };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.preventDefault(); close(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); save(); }
    });
    box.addEventListener("focusout", (event) => { if (field.value === text && !box.contains(event.relatedTarget)) close(); });
    actions.addEventListener("mousedown", (event) => event.preventDefault());  // the field keeps the focus until the click
    actions.append(action("Cancel", "cancel", close), action("Save", "save", save));
    box.className = "editor"; actions.className = "editor-actions"; field.title = "Enter: save. Escape: cancel.";
    box.append(field, actions); host.append(box);
    const fit = () => { field.style.height = "auto"; field.style.height = field.scrollHeight + "px"; };
    field.addEventListener("input", fit); field.focus(); fit();
  };
  const copy = async (button) => {
    const text = button.closest("[data-source]").dataset.source;
    try { await navigator.clipboard.writeText(text); } catch { return; }
    button.classList.add("done"); setTimeout(() => button.classList.remove("done"), 1200);
  };
  const act = (element, trigger) => element.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    if (!button) return;
    const { do: name, id } = button.dataset;
    if (name === "copy") return void copy(button);
    if (name === "edit") {
      const message = button.closest(".message") || document.querySelector(`.message[data-id="${id}"]`);
      return editor(message.querySelector(".body"), message.dataset.source, "Edit the question", (text) => trigger("edit", { id, text }));
    }
    if (name === "rename") {
      const row = button.closest(".item");
      return editor(row, row.querySelector(".open span").textContent, "New title", (text) => trigger("rename", { id, text }));
    }
    if (confirming.has(name) && !button.classList.contains("sure")) {
      button.classList.add("sure");
      return void setTimeout(() => button.classList.remove("sure"), 2500);
    }
    button.classList.remove("sure");
    if (name === "open") frame().remove("show-left");
    trigger(name, { id });
  });

  const dark = () => document.body.classList.contains("dark");
  const setTheme = (on) => { document.body.classList.toggle("dark", on); localStorage.setItem("pitlane-theme", on ? "dark" : "light"); };
  document.addEventListener("click", (event) => {
    const side = event.target.closest("[data-side]");
    if (side) {
      const name = "show-" + side.dataset.side;
      const open = !frame().contains(name);
      frame().remove("show-left", "show-right");
      frame().toggle(name, open);
    } else if (event.target.closest("#middle")) frame().remove("show-left", "show-right");
    if (event.target.closest("header .theme")) setTheme(!dark());
  });

  const follow = (scroll) => {
    let near = true, messages = 0;
    scroll.addEventListener("scroll", () => { near = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80; });
    addEventListener("resize", () => { if (near) scroll.scrollTop = scroll.scrollHeight; });
    new MutationObserver(() => {
      const thread = scroll.querySelector("[data-conversation]");
      const id = thread ? thread.dataset.conversation : "";
      if (location.hash.slice(1) !== id) { history.replaceState(null, "", id ? "#" + id : location.pathname + location.search); near = true; }
      const count = scroll.querySelectorAll(".message").length;
      if (count > messages) near = true;  // a new question, or its answer, comes into sight
      messages = count;
      if (near) scroll.scrollTop = scroll.scrollHeight;
    }).observe(scroll, { childList: true, subtree: true, characterData: true, attributes: true, attributeFilter: ["data-conversation"] });
  };
  const dropFiles = () => {
    let depth = 0;
    const files = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
    const mark = (change) => { depth = Math.max(0, depth + change); frame().toggle("dropping", depth > 0); };
    addEventListener("dragenter", (event) => files(event) && mark(1));
    addEventListener("dragleave", (event) => files(event) && mark(-1));
    addEventListener("dragover", (event) => files(event) && event.preventDefault());
    addEventListener("drop", (event) => {
      if (!files(event)) return;
      event.preventDefault(); mark(-depth);
      const input = document.querySelector("#left input[type=file]");
      if (!input) return;
      input.files = event.dataTransfer.files;
      input.dispatchEvent(new Event("change", { bubbles: true }));
    });
  };
  const start = () => {
    const scroll = document.getElementById("scroll");
    if (!scroll) return void setTimeout(start, 50);
    const chosen = localStorage.getItem("pitlane-theme");
    if (chosen) document.body.classList.toggle("dark", chosen === "dark");
    follow(scroll); dropFiles();
  };
  const KEPT = "pitlane-tab";  // of this tab alone: two tabs have their own plugins
  const kept = sessionStorage.getItem(KEPT) || "{}";
  const keep = (part) => sessionStorage.setItem(KEPT, JSON.stringify({ ...JSON.parse(sessionStorage.getItem(KEPT) || "{}"), ...part }));
  window.pitlane = { act, keep, kept, anchor: location.hash.slice(1) };
  start();
})();
