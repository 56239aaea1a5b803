// The page of `minigpt serve`. What a model writes is only ever set as textContent, never as HTML.

const PRESETS = {
  balanced: { temperature: 0.9, top_p: 0.9, top_k: 0, min_p: 0, repetition_penalty: 1.1 },
  careful: { temperature: 0.6, top_p: 0.8, top_k: 0, min_p: 0, repetition_penalty: 1.1 },
  daring: { temperature: 1.2, top_p: 1, top_k: 0, min_p: 0.02, repetition_penalty: 1.1 },
  likeliest: { temperature: 0, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1.1 },
};
const PRESETS_HELP = {
  balanced: "Varied, and mostly to the point.",
  careful: "Keeps to what the model is sure of.",
  daring: "Surprising words, and more nonsense.",
  likeliest: "Always the likeliest word: the seed changes nothing.",
  own: "Your own settings.",
};
const SETTINGS = Object.keys(PRESETS.balanced);
const CANDIDATES = 5; // as many as OpenAI's format allows

const STATES = {
  ready: "Ready",
  loading: "The server is loading its model. This page goes on when that is done.",
  away: "The server is away. This page looks for it every two seconds, and keeps your texts.",
  locked: "The server asks for a key.",
};
const MOST_SURPRISING = Math.log(1e-4);

const AWAY_S = 2;
const READY_S = 10;

const find = (id) => document.getElementById(id);
const percent = new Intl.NumberFormat("en", { style: "percent", maximumSignificantDigits: 2 });

let models = [];
let key = sessionStorage.getItem("key") ?? "";
let state = "connecting";
let timer;
let running = null; // the AbortController of the texts that are being written

// The server

class Locked extends Error {}
class Away extends Error {}

function unlessStopped(error) {
  throw error.name === "AbortError" ? error : new Away();
}

/** Calls the API; throws Locked, Away or an Error in the server's words. */
async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const asked = fetch(`v1/${path}`, { cache: "no-store", headers, ...options });
  const response = await asked.catch(unlessStopped);
  if (response.status === 401) throw new Locked();
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const message = answer?.error?.message ?? `the server answered ${response.status}`;
  const wait = response.headers.get("Retry-After");
  throw new Error(wait ? `${message} (try again in ${wait} s)` : message);
}

/** Yields the events of a stream; throws Away if it ends before it says that it is done. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const next = () => reader.read().catch(unlessStopped);
  let rest = "";
  for (let piece = await next(); !piece.done; piece = await next()) {
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
  throw new Away();
}

/** Asks how the server is and which models it has, now and ever again. */
async function look() {
  clearTimeout(timer);
  let found = "away";
  let list = models;
  try {
    const signal = AbortSignal.timeout(5000);
    const health = await fetch("health", { cache: "no-store", signal });
    if (health.status === 503) found = "loading";
    if (health.ok) {
      list = (await (await call("models", { signal })).json()).data;
      found = "ready";
    }
  } catch (error) {
    if (error instanceof Locked) found = "locked";
  }
  listModels(list);
  enter(found);
  clearTimeout(timer);
  if (found !== "locked") timer = setTimeout(look, 1000 * (found === "ready" ? READY_S : AWAY_S));
}

function enter(next) {
  if (next === state) return;
  const wasLocked = state === "locked";
  state = next;
  find("connection").textContent = STATES[state];
  find("connection").dataset.state = state;
  find("unlock").hidden = state !== "locked";
  if (state === "locked") find("key").focus();
  else if (wasLocked) find("prompt").focus();
  showButtons();
}

function listModels(list) {
  if (JSON.stringify(list) === JSON.stringify(models)) return;
  models = list;
  const options = () => models.map((model) => new Option(model.id, model.id));
  const [chosen, beside] = [find("model").value, find("other").value];
  find("model").replaceChildren(...options());
  find("other").replaceChildren(new Option(models.length > 1 ? "nothing" : "no other is loaded", ""), ...options());
  const known = (id) => models.some((model) => model.id === id);
  if (known(chosen)) find("model").value = chosen;
  if (known(beside)) find("other").value = beside;
  find("other").disabled = models.length < 2;
  showRequest();
}

// The request

const chosenIn = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

function chosenModels() {
  const ids = [find("model").value, find("other").value];
  return models.filter((model) => ids.includes(model.id));
}

function request() {
  const numbers = ["max_tokens", ...SETTINGS, "seed"].map((id) => [id, find(id).valueAsNumber]);
  return {
    model: find("model").value,
    prompt: find("prompt").value,
    ...Object.fromEntries(numbers),
  };
}

function usePreset() {
  const preset = chosenIn("preset");
  find("preset-help").textContent = PRESETS_HELP[preset];
  for (const [name, value] of Object.entries(PRESETS[preset] ?? {})) find(name).value = value;
  if (preset === "own") find("settings").open = true;
}

/** Shows what belongs together: the code of the request, and which models can stand side by side. */
function showRequest() {
  for (const option of find("other").options) option.disabled = option.value === find("model").value;
  if (find("other").value === find("model").value) find("other").value = "";
  const asked = chosenModels();
  find("prompt").required = asked.some((model) => !model.starts_empty);
  find("max_tokens").max = Math.min(...asked.map((model) => model.limits.max_tokens));
  const write = { curl, python }[chosenIn("language")];
  find("snippet").textContent = write(request(), new URL("v1", document.baseURI).href);
  find("copied").textContent = "";
}

function curl(body, api) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const lines = [`curl ${api}/completions`, "-H 'Content-Type: application/json'"];
  if (key) lines.push('-H "Authorization: Bearer $MINIGPT_API_KEY"');
  return [...lines, `-d '${json}'`].join(" \\\n  ");
}

function python({ top_k, min_p, repetition_penalty, ...body }, api) {
  const named = Object.entries(body).map(([name, value]) => `    ${name}=${JSON.stringify(value)},\n`);
  const more = JSON.stringify({ top_k, min_p, repetition_penalty }).replaceAll(/([:,])/g, "$1 ");
  return `${key ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(api)}, api_key=${key ? 'os.environ["MINIGPT_API_KEY"]' : '"none"'})
answer = client.completions.create(
${named.join("")}    extra_body=${more},
)
print(answer.choices[0].text)
`;
}

async function copy() {
  const snippet = find("snippet");
  getSelection().selectAllChildren(snippet);
  // Browsers have a clipboard only for https and for this machine.
  const copied = await navigator.clipboard?.writeText(snippet.textContent).then(() => true, () => false);
  if (!copied) snippet.focus();
  find("copied").textContent = copied ? "Copied." : "Selected: copy it with Ctrl+C.";
}

// The texts

/** One model's text, and the candidates at the place in it that one looks at. */
class Panel {
  constructor(body) {
    this.body = body;
    this.element = find("panel").content.cloneNode(true).firstElementChild;
    const one = (selector) => this.element.querySelector(selector);
    [this.name, this.facts, this.text, this.outcome] = ["h2", ".facts", ".text", ".outcome"].map(one);
    [this.inspector, this.place, this.where] = [".inspector", "input", ".where"].map(one);
    [this.rows, this.hint] = ["tbody", ".hint"].map(one);
    this.tokens = []; // of each: its element, where its text begins, its name, the candidates
    this.points = []; // the text's code points, which the server counts in
    const model = models.find((other) => other.id === body.model);
    this.name.textContent = model.answers_as;
    this.facts.textContent = facts(model);
    const prompt = document.createElement("span");
    prompt.className = "prompt";
    prompt.textContent = body.prompt;
    this.text.append(prompt);
    for (const happening of ["pointermove", "click"]) {
      this.text.addEventListener(happening, ({ target, movementX, movementY }) => {
        // Text that moves below a resting pointer is no wish to look at it.
        const rests = happening === "pointermove" && !movementX && !movementY;
        if (target.dataset.index && !rests) this.inspect(Number(target.dataset.index));
      });
    }
    for (const happening of ["input", "focus"]) {
      this.place.addEventListener(happening, () => {
        this.inspect(this.place.valueAsNumber);
        this.tokens[this.current].element.scrollIntoView({ block: "nearest" });
      });
    }
  }

  /** Writes the text as it comes; returns how it ended, in words. */
  async write(signal) {
    this.element.classList.add("writing");
    this.text.ariaBusy = "true";
    const start = performance.now();
    const done = () => {
      const tokens = `${this.tokens.length} ${this.tokens.length === 1 ? "token" : "tokens"}`;
      return `${tokens} in ${((performance.now() - start) / 1000).toFixed(1)} s`;
    };
    let ending;
    try {
      const body = JSON.stringify({ ...this.body, stream: true, logprobs: CANDIDATES });
      let reason;
      for await (const event of events(await call("completions", { method: "POST", body, signal }))) {
        if (!event.choices.length) continue;
        this.name.textContent = event.model; // a new version may have taken over
        this.add(event.choices[0]);
        reason = event.choices[0].finish_reason ?? reason;
      }
      ending = `${done()}${reason === "length" ? ", as many as were asked for" : ""}.`;
    } catch (error) {
      if (signal.aborted) ending = `Stopped after ${done()}.`;
      else if (error instanceof Locked) ending = "The server asks for a key.";
      else if (error instanceof Away) ending = `The server went away after ${done()}.`;
      else ending = `It did not work: ${error.message}`;
      if (!signal.aborted) look();
    }
    this.element.classList.remove("writing");
    this.text.ariaBusy = "false";
    this.outcome.textContent = ending;
    return `${this.name.textContent}: ${ending}`;
  }

  add({ text, logprobs }) {
    this.points.push(...text);
    const first = Math.max(0, this.tokens.length - 1);
    logprobs.tokens.forEach((chosen, index) => {
      const element = document.createElement("span");
      const logprob = logprobs.token_logprobs[index];
      element.className = "token";
      element.dataset.index = this.tokens.length;
      element.style.setProperty("--surprise", Math.min(1, logprob / MOST_SURPRISING));
      const candidates = { ...logprobs.top_logprobs[index], [chosen]: logprob };
      this.tokens.push({ element, chosen, candidates, offset: logprobs.text_offset[index] });
      this.text.append("", element);
    });
    for (let index = first; index < this.tokens.length; index++) {
      const { element, offset } = this.tokens[index];
      const written = this.points.slice(offset, this.tokens[index + 1]?.offset).join("");
      const word = written.trimStart();
      // The space stands before the element, so that it has no tint where a line is broken.
      element.previousSibling.data = written.slice(0, written.length - word.length);
      element.textContent = word;
    }
    this.inspector.hidden = !this.tokens.length;
    this.place.max = this.tokens.length - 1;
  }

  /** Shows the candidates of the token at an index. */
  inspect(index) {
    this.tokens[this.current]?.element.classList.remove("current");
    this.current = index;
    const { element, chosen, candidates } = this.tokens[index];
    element.classList.add("current");
    const ranked = Object.entries(candidates).sort((a, b) => b[1] - a[1]);
    const rows = ranked.map(([token, logprob]) => {
      const row = document.createElement("tr");
      const name = document.createElement("th");
      name.scope = "row";
      name.textContent = visible(token);
      const share = document.createElement("td");
      share.textContent = percent.format(Math.exp(logprob));
      share.style.setProperty("--share", Math.exp(logprob));
      row.classList.toggle("chosen", token === chosen);
      row.append(name, share);
      return row;
    });
    this.rows.replaceChildren(...rows);
    this.hint.hidden = true;
    this.where.textContent = `${index + 1} of ${this.tokens.length}`;
    const words = ranked.map(([token, logprob]) => `${visible(token)} ${percent.format(Math.exp(logprob))}`);
    this.place.value = index;
    this.place.ariaValueText = `${visible(chosen)}. Weighed: ${words.join(", ")}`;
  }
}

/** Returns the name of a token, which may be none, or nothing but white space. */
function visible(token) {
  if (!token) return "(end of text)";
  return token.trim() ? token : JSON.stringify(token);
}

function facts({ alias, figures }) {
  const bits = figures.bits_per_byte;
  return [alias && `@${alias}`, bits && `${bits.toFixed(2)} bits per byte`].filter(Boolean).join(" · ");
}

async function write() {
  if (running || state !== "ready") return;
  running = new AbortController();
  showButtons();
  find("progress").textContent = "Writing…";
  const ids = [find("model").value, find("other").value].filter(Boolean);
  const panels = ids.map((model) => new Panel({ ...request(), model }));
  find("texts").replaceChildren(...panels.map((panel) => panel.element));
  const below = find("texts").getBoundingClientRect().top > innerHeight / 2;
  if (below) find("texts").scrollIntoView();
  const endings = await Promise.all(panels.map((panel) => panel.write(running.signal)));
  find("progress").textContent = endings.join(" ");
  running = null;
  showButtons();
}

function showButtons() {
  const idle = !running && state === "ready";
  // Not `disabled`, which would take the focus away.
  find("write").ariaDisabled = find("again").ariaDisabled = String(!idle);
  find("stop").ariaDisabled = String(!running);
}

// What one does

find("request").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
find("again").addEventListener("click", () => {
  if (running || state !== "ready") return;
  find("seed").stepUp();
  find("request").requestSubmit();
  showRequest();
});
find("stop").addEventListener("click", () => running?.abort());
find("copy").addEventListener("click", copy);
find("unlock").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = find("key").value;
  await look();
  const wrong = state === "locked";
  find("unlock-problem").textContent = wrong ? "That is not the key." : "";
  find("key").ariaInvalid = String(wrong);
  if (wrong) find("key").select();
  else sessionStorage.setItem("key", key);
  showRequest();
});
// A closed section can't show which of its fields is wrong.
find("settings").addEventListener("invalid", () => (find("settings").open = true), true);
document.addEventListener("input", ({ target }) => {
  if (SETTINGS.includes(target.id)) document.querySelector('[value="own"]').checked = true;
  if (target.name === "preset" || SETTINGS.includes(target.id)) usePreset();
  showRequest();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) {
    find("request").requestSubmit();
  }
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && state !== "locked") look();
});

usePreset();
showRequest();
showButtons();
look();
