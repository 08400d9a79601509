// Chats with one model, or with two models or settings side by side.

import { events, json } from "./api.js";
import { element, field } from "./dom.js";
import { render } from "./markdown.js";

/** Settings of a chat, and what a request takes of them. */
class Settings {
  constructor() {
    const number = (min, max, step) => element("input", { type: "number", min, max, step, placeholder: "default" });
    this.model = element("select");
    this.system = element("textarea", { rows: 2, placeholder: "none" });
    this.temperature = number(0, 2, 0.1);
    this.topP = number(0, 1, 0.05);
    this.maxTokens = number(1, 1e6, 1);
    this.seed = number(0, 2 ** 31, 1);
    this.more = element("textarea", { rows: 2, spellcheck: false, placeholder: '{"top_k": 20, "reasoning_effort": "low"}' });
    this.schema = element("textarea", { rows: 3, spellcheck: false, placeholder: '{"type": "object", …}' });
    this.tools = element("textarea", { rows: 3, spellcheck: false, placeholder: '[{"type": "function", "function": {…}}]' });
    this.node = element("div", { className: "panel" },
      element("div", { className: "row" }, field("Model", this.model), field("Temperature", this.temperature), field("Top p", this.topP),
        field("Most tokens", this.maxTokens), field("Seed", this.seed)),
      element("details", {}, element("summary", { textContent: "System prompt, JSON schema, tools, more" }),
        field("System prompt", this.system), field("JSON schema of the answer", this.schema), field("Tools", this.tools), field("More of the request's body", this.more)));
  }

  setModels(names) {
    const chosen = this.model.value;
    this.model.replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
    if (names.includes(chosen)) this.model.value = chosen;
  }

  /** Raises an Error with a sentence for what is not JSON. */
  body(messages) {
    const body = { model: this.model.value, stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: 5 };
    body.messages = this.system.value.trim() ? [{ role: "system", content: this.system.value }, ...messages] : messages;
    for (const [name, control] of [["temperature", this.temperature], ["top_p", this.topP], ["max_tokens", this.maxTokens], ["seed", this.seed]]) {
      if (control.value !== "") body[name] = Number(control.value);
    }
    if (this.schema.value.trim()) {
      body.response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema: parsed(this.schema.value, "the JSON schema") } };
    }
    if (this.more.value.trim()) Object.assign(body, parsed(this.more.value, "what is more of the body"));
    if (this.tools.value.trim()) body.tools = parsed(this.tools.value, "the list of tools");
    return body;
  }
}

function parsed(text, what) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${what} is not JSON: ${error.message}`);
  }
}

/** One conversation: its messages, and the answer that is streaming. */
class Chat {
  constructor(onChange) {
    this.settings = new Settings();
    this.messages = []; // {role, content, reasoning, toolCalls, tokens, figures, error}
    this.running = null;
    this.onChange = onChange;
    this.log = element("div", { role: "log" });
    this.log.setAttribute("aria-label", "Conversation");
    this.node = element("div", {}, this.settings.node, this.log);
  }

  async send(text) {
    this.messages.push({ role: "user", content: text });
    this.draw();
    await this.answer();
  }

  async answer() {
    const answer = { role: "assistant", content: "", reasoning: "", toolCalls: [], tokens: [], figures: "", error: "" };
    const history = this.messages.filter((each) => !each.error).map(asMessage);
    this.messages.push(answer);
    this.running = new AbortController();
    this.onChange();
    const node = this.drawMessage(answer, this.messages.length - 1);
    this.log.append(node);
    const began = performance.now();
    let first = null;
    let usage = null;
    let frame = 0;
    const redraw = () => {
      frame = 0;
      this.fill(node, answer, this.messages.indexOf(answer));
      node.scrollIntoView({ block: "nearest" });
    };
    try {
      for await (const chunk of events("v1/chat/completions", { method: "POST", body: this.settings.body(history), signal: this.running.signal })) {
        if (chunk.error) throw new Error(chunk.error.message ?? chunk.error);
        usage = chunk.usage ?? usage;
        const choice = chunk.choices?.[0];
        if (!choice) continue;
        take(answer, choice);
        first ??= performance.now();
        const seconds = (performance.now() - first) / 1000;
        answer.figures = figures(first - began, answer.tokens.length, seconds, usage);
        if (choice.finish_reason) answer.finish = choice.finish_reason;
        frame ||= requestAnimationFrame(redraw);
      }
      if (first !== null) answer.figures = figures(first - began, usage?.completion_tokens ?? answer.tokens.length, (performance.now() - first) / 1000, usage);
    } catch (error) {
      if (this.running.signal.aborted) answer.finish = "stopped";
      else answer.error = error.message;
    }
    cancelAnimationFrame(frame);
    this.running = null;
    redraw();
    this.onChange();
  }

  stop() {
    this.running?.abort();
  }

  retryFrom(index) {
    if (this.running) return;
    this.messages.length = index;
    this.draw();
    this.answer();
  }

  edit(index) {
    const { content } = this.messages[index];
    this.messages.length = index;
    this.draw();
    return content;
  }

  draw() {
    this.log.replaceChildren(...this.messages.map((message, index) => this.drawMessage(message, index)));
  }

  drawMessage(message, index) {
    const node = element("article", { className: `message ${message.role}` });
    this.fill(node, message, index);
    return node;
  }

  fill(node, message, index) {
    const open = node.querySelector("details")?.open ?? false;
    const head = element("div", { className: "who" }, element("span", { textContent: message.role }));
    const button = (label, act) => head.append(element("button", { type: "button", textContent: label, onclick: act }));
    if (message.role === "user" && !this.running) button("Edit", () => this.onEdit(this.edit(index)));
    if (message.role === "assistant" && !this.running) button("Retry", () => this.retryFrom(index));
    if (message.role === "assistant" && message.tokens.length) {
      button(message.showTokens ? "Text" : "Tokens", () => { message.showTokens = !message.showTokens; this.fill(node, message, index); });
    }
    const parts = [head];
    if (message.reasoning) {
      const details = element("details", { open }, element("summary", { textContent: "Reasoning" }), element("div", { className: "plain quiet", textContent: message.reasoning }));
      parts.push(details);
    }
    if (message.showTokens) parts.push(tokenView(message.tokens));
    else if (message.role === "assistant") parts.push(element("div", {}, render(message.content)));
    else parts.push(element("div", { className: "plain", textContent: message.content }));
    for (const call of message.toolCalls ?? []) {
      parts.push(element("pre", { tabIndex: 0 }, element("code", { textContent: `${call.name}(${call.arguments})` })));
    }
    if (message.error) parts.push(element("p", { className: "error", textContent: message.error }));
    if (message.figures || message.finish) {
      const end = message.finish && message.finish !== "stop" ? ` · ended by ${message.finish}` : "";
      parts.push(element("p", { className: "quiet", textContent: (message.figures ?? "") + end }));
    }
    node.replaceChildren(...parts);
  }
}

function asMessage({ role, content, toolCalls }) {
  if (!toolCalls?.length) return { role, content };
  return { role, content, tool_calls: toolCalls.map((call, index) => ({ id: call.id ?? `call_${index}`, type: "function", function: { name: call.name, arguments: call.arguments } })) };
}

function take(answer, choice) {
  const { delta = {}, logprobs } = choice;
  answer.content += delta.content ?? "";
  answer.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
  for (const call of delta.tool_calls ?? []) {
    const known = (answer.toolCalls[call.index] ??= { id: call.id, name: "", arguments: "" });
    known.name += call.function?.name ?? "";
    known.arguments += call.function?.arguments ?? "";
  }
  answer.tokens.push(...(logprobs?.content ?? []));
}

function figures(milliseconds, count, seconds, usage) {
  const parts = [`first token ${Math.round(milliseconds)} ms`];
  if (count > 1 && seconds > 0) parts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
  parts.push(`${count} tokens`);
  if (usage) parts.push(`prompt ${usage.prompt_tokens}${usage.prompt_tokens_details?.cached_tokens ? `, ${usage.prompt_tokens_details.cached_tokens} cached` : ""}`);
  return parts.join(" · ");
}

/** Tokens coloured by probability; the alternatives of the one that is pointed at, or chosen by the arrow keys. */
function tokenView(tokens) {
  const list = element("div", { className: "panel quiet", id: "alternatives", hidden: true });
  list.setAttribute("role", "status");
  const view = element("div", { className: "tokens", tabIndex: 0 });
  view.setAttribute("role", "group");
  view.setAttribute("aria-label", "Tokens; the arrow keys show the alternatives of each");
  let at = -1;
  const show = (index) => {
    const [node, token] = [view.children[index], tokens[index]];
    view.querySelector(".chosen")?.classList.remove("chosen");
    node.classList.add("chosen");
    at = index;
    const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
    list.replaceChildren(...token.top_logprobs.map((other) => element("div", { textContent: `${JSON.stringify(other.token)}  ${percent(other.logprob)}` })));
    const { left, bottom } = node.getBoundingClientRect();
    list.style.left = `${Math.max(4, Math.min(left, innerWidth - 300))}px`;
    list.style.top = `${bottom + 4}px`;
    list.hidden = false;
  };
  for (const [index, token] of tokens.entries()) {
    const level = [0.9, 0.5, 0.2, 0.05].filter((bound) => Math.exp(token.logprob) < bound).length;
    const node = element("span", { className: `t${level}`, textContent: token.token });
    node.addEventListener("mouseenter", () => show(index));
    view.append(node);
  }
  view.addEventListener("mouseleave", () => { list.hidden = true; });
  view.addEventListener("blur", () => { list.hidden = true; });
  view.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !tokens.length) return;
    event.preventDefault();
    show(Math.min(tokens.length - 1, Math.max(0, at + step)));
  });
  return element("div", {}, view, list);
}

export class Talk {
  constructor(root) {
    const change = () => this.update();
    this.chats = [new Chat(change), new Chat(change)];
    for (const chat of this.chats) chat.onEdit = (text) => { this.input.value = text; this.input.focus(); };
    this.isTwo = false;
    this.columns = element("div", { className: "columns" }, this.chats[0].node);
    this.input = element("textarea", { rows: 3, placeholder: "Ask something. Enter sends, Shift+Enter makes a line." });
    this.input.setAttribute("aria-label", "Message");
    this.sendButton = element("button", { className: "primary", textContent: "Send" });
    this.stopButton = element("button", { type: "button", textContent: "Stop", disabled: true });
    const clear = element("button", { type: "button", textContent: "New chat" });
    const two = element("button", { type: "button", textContent: "Side by side" });
    two.setAttribute("aria-pressed", "false");
    const form = element("form", { className: "panel" }, this.input, element("div", { className: "row" }, this.sendButton, this.stopButton, clear, two));
    root.append(this.columns, form);
    form.addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
      if (event.key === "Escape") this.stop();
    });
    this.stopButton.addEventListener("click", () => this.stop());
    clear.addEventListener("click", () => { this.stop(); for (const chat of this.chats) { chat.messages = []; chat.draw(); } this.input.focus(); });
    two.addEventListener("click", () => {
      this.isTwo = !this.isTwo;
      two.setAttribute("aria-pressed", String(this.isTwo));
      this.columns.classList.toggle("two", this.isTwo);
      this.columns.replaceChildren(...this.shown.map((chat) => chat.node));
    });
  }

  get shown() {
    return this.isTwo ? this.chats : this.chats.slice(0, 1);
  }

  opened() {
    this.input.focus();
    this.refresh(); // adapters come and go
  }

  /** The models that may be asked. */
  async refresh() {
    try {
      const { data } = await json("v1/models");
      for (const chat of this.chats) chat.settings.setModels(data.map((model) => model.id));
    } catch {
      // The header says what is wrong with the server or the key.
    }
  }

  event(event) {
    if (event.type === "health" && event.health.state === "ready" && !this.chats[0].settings.model.value) this.refresh();
  }

  send() {
    const text = this.input.value.trim();
    if (!text || this.shown.some((chat) => chat.running)) return;
    this.input.value = "";
    for (const chat of this.shown) chat.send(text);
  }

  stop() {
    for (const chat of this.chats) chat.stop();
  }

  update() {
    const isRunning = this.chats.some((chat) => chat.running);
    this.stopButton.disabled = !isRunning;
    this.sendButton.disabled = isRunning;
  }
}
