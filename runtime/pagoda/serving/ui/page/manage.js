// Models, settings and the history of health; what changes something asks first.

import { json, request } from "./api.js";
import { element, field } from "./dom.js";

function table(head, rows) {
  const body = element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell)))));
  return element("div", { className: "scroll", tabIndex: 0 },
    element("table", {}, element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { textContent: name, scope: "col" })))), body));
}

const panel = (title, ...content) => element("div", { className: "panel" }, element("h2", { textContent: title }), ...content);

export class Manage {
  constructor(root) {
    this.root = root;
    this.history = new Map(); // by model: [{time, state, cause}]
    this.models = element("div");
    this.adapters = element("div");
    this.loadAdapter = this.adapterForm();
    this.keys = element("div");
    this.stats = new Map(); // by model: its figures
    this.changes = element("div");
    this.settings = element("div");
    this.filter = element("input", { type: "search", placeholder: "name" });
    this.filter.setAttribute("aria-label", "Filter settings by name");
    this.said = element("p", { className: "quiet" });
    this.said.setAttribute("role", "status");
    const reset = element("button", { type: "button", textContent: "Reset the prefix cache" });
    reset.addEventListener("click", () => this.act("The prefix cache is reset.", "reset_prefix_cache", "No request will find what is cached now. Go on?"));
    this.of = element("select", { hidden: true });
    this.of.setAttribute("aria-label", "Settings of");
    this.of.addEventListener("change", () => this.refresh());
    this.filter.addEventListener("input", () => this.drawSettings());
    root.append(this.said, panel("Models", this.models, reset), panel("Adapters", this.adapters, this.loadAdapter), panel("API keys", this.keys), panel("Health", this.changes), panel("Settings", element("div", { className: "row" }, this.filter, this.of), this.settings));
  }

  opened() {
    this.refresh();
  }

  server(event) {
    this.history = new Map(event.models.map((model) => [model.name, model.history]));
    this.drawHistory();
  }

  event(event) {
    if (event.type !== "health") return;
    this.stats.set(event.model, event.stats);
    const history = this.history.get(event.model) ?? [];
    const last = history.at(-1);
    if (last?.state === event.health.state && last.time === event.health.since) return;
    history.push({ time: event.health.since, state: event.health.state, cause: event.health.cause ?? event.health.stage });
    this.history.set(event.model, history.slice(-50));
    this.drawHistory();
    if (!this.root.hidden) this.refresh();
  }

  drawHistory() {
    const rows = [...this.history].flatMap(([model, changes]) => changes.map((change) => ({ model, ...change })));
    rows.sort((one, other) => other.time - one.time);
    this.changes.replaceChildren(table(["Time", "Model", "State", "Cause"],
      rows.map((row) => [new Date(row.time * 1000).toLocaleTimeString(), row.model, row.state, row.cause ?? ""])));
  }

  async refresh() {
    if (this.root.hidden) return;
    try {
      const index = await json("v2/repository/index", { method: "POST", body: {} });
      this.models.replaceChildren(table(["Model", "Version", "State", "Reason", ""],
        index.map((model) => [model.name, model.version ?? "", model.state, model.reason ?? "", this.modelButton(model)])));
      const found = await json("settings");
      this.showModels(found.models);
      this.known = this.model ? (await json(`settings?model=${encodeURIComponent(this.model)}`)).settings : found.settings;
      this.drawSettings();
      await this.drawAdapters();
    } catch (error) {
      this.said.textContent = error.message;
    }
    await this.drawKeys();
  }

  /** The model whose settings are shown; empty: those of the server, which are all where it has one model. */
  get model() {
    return this.of.hidden ? "" : this.of.value;
  }

  showModels(names) {
    const chosen = this.of.value;
    this.of.hidden = names.length < 2;
    this.of.replaceChildren(element("option", { value: "", textContent: "the server" }), ...names.map((name) => element("option", { value: name, textContent: `model ${name}` })));
    if (names.includes(chosen)) this.of.value = chosen;
    this.base.replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
    this.base.parentElement.hidden = names.length < 2;
  }

  adapterForm() {
    const name = element("input", { required: true, spellcheck: false, autocomplete: "off" });
    const path = element("input", { required: true, spellcheck: false, autocomplete: "off", placeholder: "a directory of the server" });
    this.base = element("select");
    const form = element("form", { className: "row" }, field("Name", name), field("Path", path), field("Model", this.base), element("button", { textContent: "Load" }));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const body = { lora_name: name.value.trim(), lora_path: path.value.trim() };
      if (!this.base.parentElement.hidden) body.base_model_name = this.base.value;
      if (await this.act(`${body.lora_name} is served.`, "v1/load_lora_adapter", "", body)) form.reset();
    });
    return form;
  }

  async drawAdapters() {
    this.loadAdapter.hidden = this.of.hidden && !this.known.enable_lora?.value;
    const adapters = (await json("v1/models")).data.filter((model) => model.parent);
    if (!adapters.length) {
      this.adapters.replaceChildren(element("p", { className: "quiet", textContent: this.known.enable_lora?.value === false ? "No adapters are served: enable_lora is off." : "No adapters are served." }));
      return;
    }
    const of = (name, what) => [...this.stats.values()].some((stats) => stats[what]?.includes(name));
    this.adapters.replaceChildren(table(["Adapter", "Model", "Requests", ""], adapters.map((adapter) =>
      [adapter.id, adapter.parent, of(adapter.id, "running_adapters") ? "running" : of(adapter.id, "waiting_adapters") ? "waiting" : "none", this.unloadButton(adapter.id)])));
  }

  unloadButton(name) {
    const button = element("button", { type: "button", textContent: "Unload" });
    button.setAttribute("aria-label", `Unload the adapter ${name}`);
    button.addEventListener("click", () => this.act(`${name} is served no longer.`, "v1/unload_lora_adapter", `${name} will answer no requests. Go on?`, { lora_name: name }));
    return button;
  }

  async drawKeys() {
    try {
      const keys = await json("ui/keys");
      const left = (key, what) => (key.rate_limits[`x-ratelimit-limit-${what}`] ? `${key.rate_limits[`x-ratelimit-remaining-${what}`]} of ${key.rate_limits[`x-ratelimit-limit-${what}`]}` : "no limit");
      this.keys.replaceChildren(keys.length
        ? table(["Key", "Tenant", "Scopes", "Requests", "Last used", "Requests left a minute", "Tokens left a minute"], keys.map((key) =>
          [key.name, key.tenant, key.scopes.join(", "), String(key.requests), key.last_used ? new Date(key.last_used * 1000).toLocaleTimeString() : "never", left(key, "requests"), left(key, "tokens")]))
        : element("p", { className: "quiet", textContent: "This server has no API keys: everybody may do everything." }));
    } catch (error) {
      this.keys.replaceChildren(element("p", { className: "quiet", textContent: `The use of keys is for the scope admin: ${error.message}` }));
    }
  }

  modelButton(model) {
    const action = model.state === "READY" ? "unload" : "load";
    const button = element("button", { type: "button", textContent: action === "load" ? "Load" : "Unload" });
    button.setAttribute("aria-label", `${button.textContent} ${model.name}`);
    button.addEventListener("click", () => this.act(`${model.name}: ${action} was taken.`, `v2/repository/models/${encodeURIComponent(model.name)}/${action}`,
      action === "unload" ? `${model.name} will answer no requests. Go on?` : ""));
    return button;
  }

  /** Whether it was done. */
  async act(done, path, question, body = {}, method = "POST") {
    if (question && !confirm(question)) return false;
    let isDone = true;
    try {
      await request(path, { method, body });
      this.said.textContent = done;
    } catch (error) {
      isDone = false;
      this.said.textContent = error.message;
    }
    this.said.className = isDone ? "quiet" : "error";
    this.refresh();
    return isDone;
  }

  drawSettings() {
    const wanted = this.filter.value.trim().toLowerCase();
    const entries = Object.entries(this.known ?? {}).filter(([name]) => name.includes(wanted));
    this.settings.replaceChildren(table(["Setting", "Value", "Source", "Can change"],
      entries.map(([name, setting]) => [name, JSON.stringify(setting.value), setting.source, setting.can_change ? this.changeButton(name, setting) : setting.note])));
  }

  changeButton(name, { value, note }) {
    const button = element("button", { type: "button", textContent: note });
    button.setAttribute("aria-label", `Change ${name}, ${note}`);
    button.addEventListener("click", () => {
      const written = prompt(`${name}, as in JSON. It changes ${note}, until the server ends.`, JSON.stringify(value));
      if (written === null) return;
      let wanted;
      try {
        wanted = JSON.parse(written);
      } catch {
        wanted = written; // a word without quotes
      }
      this.act(`${name} is ${JSON.stringify(wanted)} now.`, this.model ? `settings?model=${encodeURIComponent(this.model)}` : "settings", "", { [name]: wanted }, "PATCH");
    });
    return button;
  }
}
