// The three rooms, the state of the server in the header, and the stream of events that the rooms show.

import { ApiError, events, key } from "./api.js";
import { Manage } from "./manage.js";
import { Talk } from "./talk.js";
import { Watch } from "./watch.js";

const find = (id) => document.getElementById(id);
const rooms = { talk: new Talk(find("talk")), watch: new Watch(find("watch")), manage: new Manage(find("manage")) };
const server = { models: new Map() };

function notice(text) {
  find("notice").textContent = text;
  find("notice").hidden = !text;
}

function showState(state, text) {
  document.querySelector("#state .dot").className = `dot ${state}`;
  find("state-text").textContent = text;
}

// ---- rooms

function open(room) {
  for (const name of Object.keys(rooms)) {
    const is = name === room;
    find(name).hidden = !is;
    find(`tab-${name}`).setAttribute("aria-selected", String(is));
    find(`tab-${name}`).tabIndex = is ? 0 : -1;
  }
  rooms[room].opened?.();
  history.replaceState(null, "", `#/${room}`); // no element's id: the browser would go there, and take the focus with it
}

const names = Object.keys(rooms);
for (const name of names) find(`tab-${name}`).addEventListener("click", () => open(name));
document.querySelector('[role="tablist"]').addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const at = names.findIndex((name) => find(`tab-${name}`) === document.activeElement);
  if (!step || at < 0) return;
  const next = names[(at + step + names.length) % names.length];
  open(next);
  find(`tab-${next}`).focus();
});

// ---- theme and key

const THEME = "pagoda-theme";
const setTheme = (theme) => { if (theme) document.documentElement.dataset.theme = theme; };
setTheme(localStorage.getItem(THEME));
find("theme-button").addEventListener("click", () => {
  const isDark = getComputedStyle(document.documentElement).colorScheme === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const theme = isDark ? "light" : "dark";
  localStorage.setItem(THEME, theme);
  setTheme(theme);
  rooms.watch.redraw();
});
function askForKey(show) {
  find("key-form").hidden = !show;
  find("key-button").setAttribute("aria-expanded", String(show));
  if (show) find("key").focus();
}
find("key-button").addEventListener("click", () => askForKey(find("key-form").hidden));
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(find("key").value.trim());
  find("key").value = "";
  askForKey(false);
  notice("");
  following?.abort();
  rooms.talk.refresh();
  rooms.manage.refresh();
});

// ---- events

let following = null;

function take(event) {
  if (event.type === "server") {
    server.models = new Map(event.models.map((model) => [model.name, model]));
    for (const room of Object.values(rooms)) room.server?.(event);
    for (const model of event.models) take({ ...model, type: "health", model: model.name });
    return;
  }
  if (event.type === "lost") {
    notice(`${event.events} messages of the engine were left out: this browser, or the way to the server, is too slow.`);
    return;
  }
  if (event.type === "health") {
    server.models.set(event.model, { ...server.models.get(event.model), ...event });
    const states = [...server.models.values()].map((model) => model.health);
    const worst = ["dead", "draining", "starting", "degraded"].map((state) => states.find((health) => health.state === state)).find(Boolean) ?? states[0];
    const detail = worst.state === "starting" ? `${worst.stage} ${worst.detail}`.trim() : worst.state === "ready" ? "" : worst.cause ?? "";
    showState(worst.state, detail ? `${worst.state}: ${detail}` : worst.state);
  }
  for (const room of Object.values(rooms)) room.event?.(event);
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function follow() {
  for (;;) {
    following = new AbortController();
    try {
      for await (const event of events("ui/events", { signal: following.signal })) take(event);
      showState("gone", "the server is gone");
    } catch (error) {
      if (error instanceof ApiError && [401, 403].includes(error.status)) {
        showState("gone", error.status === 401 ? "no access" : "not shown to this key");
        notice(error.status === 401 ? `An API key is needed: ${error.message}` : `This key may not look at the engine: ${error.message}`);
        if (error.status === 401) askForKey(true);
        await new Promise((resolve) => following.signal.addEventListener("abort", resolve));
        continue;
      }
      if (!following.signal.aborted) showState("gone", "no connection to the server");
    }
    await pause(500);
  }
}

open(names.find((name) => location.hash.replace("/", "") === `#${name}`) ?? "talk");
follow();
