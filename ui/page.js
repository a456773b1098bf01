/* What the page does in the browser alone: buttons in lists and messages become events of their Gradio component
   (`act`), the thread follows the answer, light or dark, side panels on narrow screens, files dropped anywhere, the model menu and
   the change to another model: the tab asks the server for its page, and loads itself again if the server has another page. */
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
  const formulas = new Map();  // TeX to MathML: an answer is drawn many times while it is written
  const katex = window.pitlaneKatex ? import(new URL(window.pitlaneKatex, location.href)).then((file) => file.default).catch(() => null) : null;
  const typeset = async (root) => {
    const open = root.querySelectorAll(".math:not(.done)");
    const drawn = open.length && await katex;
    if (!drawn) return;
    open.forEach((math) => {
      const key = `${math.classList.contains("display")} ${math.dataset.tex}`;
      if (!formulas.has(key)) {
        try { formulas.set(key, drawn.renderToString(math.dataset.tex, { output: "mathml", displayMode: math.classList.contains("display"), trust: false, maxExpand: 200, maxSize: 20 })); }
        catch { formulas.set(key, ""); }  // not TeX: the source stays
      }
      if (formulas.get(key)) math.innerHTML = formulas.get(key);
      math.classList.add("done");
    });
  };
  const fieldsOf = (form) => {
    const fields = new FormData(form);
    return { question: fields.get("question"), laps: fields.get("laps"), plan: fields.getAll("plan") };
  };
  let settle = () => {};  // raises the event `settle` on the widget of the unfinished answer
  const act = (element, trigger) => {
    if (element.closest("#live")) settle = () => trigger("settle", {});
    element.addEventListener("click", (event) => clicked(event, trigger));
  };
  const clicked = (event, trigger) => {
    const button = event.target.closest("[data-do]");
    if (!button || button.closest(".failure")) return;
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
    if (name === "open") frame().remove("show-left", "comparing");
    if (name === "compare_close") return frame().remove("comparing");
    if (name === "compare_every") {  // every plugin against the plan that is on now
      const boxes = (selector) => [...button.closest("form").querySelectorAll(selector)];
      const on = boxes(".plugins input").some((box) => !box.checked);
      boxes(".plugins input").forEach((box) => (box.checked = on));
      const now = boxes(".sets input").find((box) => box.value === "now");
      if (on && now) boxes(".sets input").forEach((box) => (box.checked = box === now));
      return;
    }
    if (name === "compare") { frame().add("comparing"); document.getElementById("compare").scrollTop = 0; }
    trigger(name, name === "compare_run" ? { id, fields: fieldsOf(button.closest("form")) } : { id });
  };

  // a question is on its way: shown until the thread changes, at most for 10 seconds
  const ASKING = new Set(["try", "retry", "go_on", "turn_on", "turn_off", "take_out"]);
  const asked = () => { frame().add("asked"); setTimeout(() => frame().remove("asked"), 10000); };
  const typed = () => document.querySelector("#box textarea").value.trim();
  document.addEventListener("click", (event) => { if (ASKING.has(event.target.closest("[data-do]")?.dataset.do) || (event.target.closest("#send") && typed())) asked(); }, true);
  document.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target.closest("#box") && typed()) asked(); }, true);

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
    const header = event.target.closest("header .model");
    if (header) showMenu(!menu().classList.contains("open"));
    else if (!event.target.closest("#models") || event.target.closest("[data-do=choose], #use-other")) showMenu(false);
    if (event.target.closest("[data-do=choose], [data-do=cancel], #use-other")) setTimeout(askState, 150);
    if (event.target.closest(".failure button")) dismissFailure();
    if (event.target.closest("header .theme")) setTheme(!dark());
    if (event.target.closest("header .keys")) document.querySelector("header .shortcuts").showModal();
    if (event.target.closest("#new")) frame().remove("comparing");
  });

  // the keyboard: SHORTCUTS in model_menu.py lists the keys
  const last = (selector) => [...document.querySelectorAll(selector)].at(-1);
  const press = (element) => { if (element && element.checkVisibility() && !element.disabled) { element.click(); return true; } return false; };
  const showVersion = (place) => press(last("#thread .message.answer")?.querySelector(`.versions button:${place}-child`)) || true;  // not back in history
  const alt = {
    KeyN: () => press(document.getElementById("new")), KeyR: () => press(last("#thread [data-do=retry]")),
    ArrowLeft: () => showVersion("first"), ArrowRight: () => showVersion("last"),
  };
  document.addEventListener("keydown", (event) => {
    const types = event.target.closest("input:not([type=checkbox], [type=radio]), textarea, select, [contenteditable]"), dialog = document.querySelector("dialog[open]");
    if (dialog || event.isComposing || event.ctrlKey || event.metaKey) return;
    let done = false;
    if (event.altKey) done = !types && alt[event.code]?.();  // in a text field, macOS types letters with Alt
    else if (event.key === "Escape" && !event.target.closest(".editor, #models")) done = press(document.getElementById("stop"));
    else if (!types && event.key === "/") { document.querySelector("#box textarea").focus(); done = true; }
    else if (!types && event.key === "?") { document.querySelector("header .shortcuts").showModal(); done = true; }
    if (done) event.preventDefault();
  });

  // An unfinished answer, by frames (ui/live_frames.py): ask for changes, draw them, ask again. Drawing has a quarter of the time.
  const FRAME_MS = 60, LONGEST_FRAME_MS = 120, HIDDEN_MS = 1000, DRAWING_SHARE = 0.25;
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const painted = () => document.hidden ? pause(0) : new Promise((done) => requestAnimationFrame((start) => { const channel = new MessageChannel(); channel.port1.onmessage = () => done(start); channel.port2.postMessage(0); }));
  const parsed = (html) => { const holder = document.createElement("template"); holder.innerHTML = html; return [...holder.content.childNodes]; };
  const update = (old, now) => {  // makes node `old` equal to `now`, and changes only the parts that differ
    if (old.isEqualNode(now) || (old.dataset?.tex && old.dataset.tex === now.dataset?.tex)) return old;
    if (old.nodeType === Node.TEXT_NODE && now.nodeType === Node.TEXT_NODE) {
      if (now.data.startsWith(old.data)) old.appendData(now.data.slice(old.data.length)); else old.data = now.data;
      return old;
    }
    if (old.nodeName !== now.nodeName || old.className !== now.className || old.nodeType !== Node.ELEMENT_NODE) { old.replaceWith(now); return now; }
    for (const { name, value } of now.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    updateAll(old, [...old.childNodes], [...now.childNodes]);
    return old;
  };
  const updateAll = (host, old, now, before = null) => {
    const nodes = now.map((node, i) => old[i] ? update(old[i], node) : host.insertBefore(node, before));
    old.slice(now.length).forEach((node) => node.remove());
    return nodes;
  };
  const drawFrames = async (article) => {
    const tab = Math.random().toString(36).slice(2);
    let number = 0, body = null, facts = null, html = [], nodes = [];  // of each block
    const drawFrame = (frame) => {
      if (frame.progress) { updateAll(article, [...article.childNodes], parsed(frame.progress)); return; }
      if (!body) {
        article.replaceChildren(...parsed('<div class="body writing"></div><footer class="stats"></footer>'));
        [body, facts] = article.children;
      }
      const [first, ...others] = frame.blocks, old = nodes[frame.keep];
      const kept = frame.cut ? html[frame.keep].slice(0, frame.cut) : "";
      nodes.slice(frame.keep + 1).flat().forEach((node) => node.remove());
      html.length = nodes.length = frame.keep;
      const blocks = first === undefined ? [] : [kept + first, ...others];
      blocks.forEach((block, i) => { html.push(block); nodes.push(updateAll(body, i ? [] : old || [], parsed(block))); });
      if (!blocks.length && old) old.forEach((node) => node.remove());
      updateAll(facts, [...facts.childNodes], parsed(frame.facts));
    };
    while (article.isConnected) {
      let frame;
      try { frame = await (await fetch(`pitlane/live/${article.dataset.live}?tab=${tab}&number=${number}`, { cache: "no-store" })).json(); }
      catch { await pause(HIDDEN_MS); continue; }  // the server does not answer
      if (frame.page !== header("").dataset.page) return askState();
      if (frame.over || !article.isConnected) break;
      let cost = 0;
      if (frame.number !== number) {
        const began = performance.now();
        drawFrame(frame);
        cost = performance.now() - began;
        const start = await painted();
        if (start) cost += performance.now() - start;
      }
      number = frame.number;
      await pause(document.hidden ? HIDDEN_MS : Math.min(LONGEST_FRAME_MS, Math.max(FRAME_MS, cost / DRAWING_SHARE)));
    }
    if (article.isConnected) settle();  // a redrawn article has a loop of its own
  };

  const follow = (scroll) => {
    let near = true, messages = 0;
    scroll.addEventListener("scroll", () => { near = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80; });
    addEventListener("resize", () => { if (near) scroll.scrollTop = scroll.scrollHeight; });
    new MutationObserver((changes) => {
      const live = scroll.querySelector("[data-live]:not(.followed)");
      if (live) { live.classList.add("followed"); drawFrames(live); }
      const isFrame = ({ target }) => (target.nodeType === Node.ELEMENT_NODE ? target : target.parentElement)?.closest(".writing, .writing + .stats");
      if (changes.every(isFrame)) {
        if (scroll.querySelector(".writing .math:not(.done)")) typeset(scroll);
        if (near) scroll.scrollTop = scroll.scrollHeight;
        return;
      }
      const thread = scroll.querySelector("[data-conversation]");
      const id = thread ? thread.dataset.conversation : "";
      if (location.hash.slice(1) !== id) { history.replaceState(null, "", id ? "#" + id : location.pathname + location.search); near = true; }
      const count = scroll.querySelectorAll(".message").length;
      if (count > messages) near = true;  // a new question, or its answer, comes into sight
      messages = count;
      frame().remove("asked");
      typeset(scroll);
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
  // the model: its menu, and the change to another model
  const STATE_MS = 2500, CHANGING_MS = 400, SEEN = "pitlane-failure", TRIED = "pitlane-page";
  const header = (selector) => document.querySelector("header" + selector), menu = () => document.getElementById("models");
  const showMenu = (open) => {
    if (!menu() || menu().classList.contains("open") === open) return;
    menu().classList.toggle("open", open);
    header(" .model").setAttribute("aria-expanded", open);
    if (open) menu().querySelector("button, input")?.focus(); else if (menu().contains(document.activeElement)) header(" .model").focus();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") showMenu(false);
    if (event.key === "Enter" && event.target.closest("#other-name")) { setTimeout(showMenu, 0, false); setTimeout(askState, 150); }
  });
  const draw = ({ text, brief, share, failure }) => {
    header(" .change").hidden = header(" .track").hidden = !text;
    header("").classList.toggle("changing", Boolean(text)); frame().toggle("changing", Boolean(text));
    const label = header(" .change span");
    label.textContent = matchMedia("(max-width: 900px)").matches ? brief : text; label.title = text;
    header(" .track").classList.toggle("unknown", share === null);
    header(" .track i").style.width = share === null ? "" : `${100 * share}%`;
    const isNew = failure && sessionStorage.getItem(SEEN) !== failure.key;
    header(" .failure").hidden = !isNew;
    if (isNew) { header(" .failure").dataset.key = failure.key; header(" .failure span").textContent = failure.text; }
  };
  const dismissFailure = () => { sessionStorage.setItem(SEEN, header(" .failure").dataset.key); header(" .failure").hidden = true; };
  const loadAgain = (page) => {
    if (sessionStorage.getItem(TRIED) === page) return;  // a page of another server, or a stale copy: once is enough
    sessionStorage.setItem(TRIED, page);
    const typed = document.querySelector("#box textarea").value || document.querySelector(".message .inline-editor")?.value || "";
    keep({ text: typed });
    location.reload();
  };
  let asking, timer;
  const askState = async () => {
    if (asking) return;
    clearTimeout(timer); asking = true;
    let wait = STATE_MS;
    try {
      const answer = await fetch("pitlane/model", { cache: "no-store" });
      if (answer.status === 401) return void location.reload();  // the server was started again, and asks for its password
      const state = await answer.json();
      if (state.page !== header("").dataset.page) loadAgain(state.page);
      else { draw(state); if (state.text) wait = CHANGING_MS; }
    } catch { /* the server is away: ask later */ }
    asking = false; timer = setTimeout(askState, wait);
  };
  document.addEventListener("visibilitychange", () => { if (!document.hidden && header("")) askState(); });
  const start = () => {
    const scroll = document.getElementById("scroll");
    if (!scroll) return void setTimeout(start, 50);
    const chosen = localStorage.getItem("pitlane-theme");
    if (chosen) document.body.classList.toggle("dark", chosen === "dark");
    follow(scroll); dropFiles(); askState();
  };
  const KEPT = "pitlane-tab";  // of this tab alone: two tabs have their own plugins
  const kept = sessionStorage.getItem(KEPT) || "{}";
  const keep = (part) => sessionStorage.setItem(KEPT, JSON.stringify({ ...JSON.parse(sessionStorage.getItem(KEPT) || "{}"), ...part }));
  keep({ text: "" });  // `kept` has it; the next reload shall not bring it back
  const keepChanged = (defaults, values) => {  // the defaults of another model differ
    const changed = defaults.map(([name, value], i) => [name, value, values[i]]).filter(([, value, now]) => value !== now);
    keep({ values: Object.fromEntries(changed.map(([name, , now]) => [name, now])) });
  };
  window.pitlane = { act, keep, keepChanged, kept, anchor: location.hash.slice(1) };
  start();
})();
