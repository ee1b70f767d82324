// Shows the completions. Every text of a model enters the page through textContent, never as markup.
(() => {
  const { data, get, make } = psacpo;
  const { policies, judges, prompts } = data;
  if (!prompts.length || !get("viewer")) return;
  const swept = policies.map((policy, index) => index).filter((index) => policies[index].ratio !== null);
  const revealed = new Set();
  let current = null;

  const option = (value, text) => {
    const element = make("option", "", text);
    element.value = value;
    return element;
  };
  const promptText = (prompt) => prompt.messages.map((message) => message[1]).join("\n");
  const lastUser = (prompt) => prompt.messages.filter(([role]) => role === "user").pop()?.[1] || promptText(prompt);
  const answersOf = (prompt) => prompt.answers.flat();
  const unsafeAt = (prompt, index) => prompt.answers[index].some((answer) => answer.unsafe === 1);

  const chosen = swept.find((index) => policies[index].chosen);
  const [low, high] = data.dial.path ? ["lowest ratio", "highest"] : ["most reward", "most safety"];
  const kinds = {
    all: ["all prompts", () => true],
    flip: [`unsafe at the ${low}, safe at the ${high}`, (prompt) =>
      unsafeAt(prompt, swept[0]) && !unsafeAt(prompt, swept[swept.length - 1])],
    back: [`safe at the ${low}, unsafe at the ${high}`, (prompt) =>
      !unsafeAt(prompt, swept[0]) && unsafeAt(prompt, swept[swept.length - 1])],
    unsafe: [`unsafe at the chosen ${data.dial.kind}`, (prompt) => unsafeAt(prompt, chosen)],
    split: ["judges differ on what is unsafe", (prompt) => answersOf(prompt).some((answer) => answer.split)],
    cut: ["with a completion that was cut", (prompt) => answersOf(prompt).some((answer) => answer.cut)],
    invalid: ["with a missing or invalid verdict", (prompt) =>
      answersOf(prompt).some((answer) => answer.scores.includes(null))],
  };
  if (chosen === undefined) delete kinds.unsafe;

  // One answer: tags, the text (veiled where it was judged unsafe), and each judge's score.
  const answerView = (answer, id, many) => {
    const box = make("div", "answer");
    const facts = make("p", "facts-line");
    if (answer.unsafe === 1) facts.append(make("span", "tag unsafe", "judged unsafe"));
    if (answer.unsafe === -1) facts.append(make("span", "tag unsafe", "not judged for harm"));
    if (answer.split) facts.append(make("span", "tag", "judges differ"));
    if (answer.cut) facts.append(make("span", "tag", "cut"));
    const size = answer.tokens === undefined ? "" : answer.tokens + " tokens";
    facts.append(many ? "sample " + ((answer.sample || 0) + 1) + (size ? ", " + size : "") : size);
    box.append(facts);
    const text = make("p", "text", answer.text || "(empty)");
    // A judge may quote what it judged: its words are veiled with the text.
    const words = Object.entries(answer.words || {}).map(([judge, said]) => make("p", "words", judge + " said: " + said));
    if (answer.unsafe !== 0 && !revealed.has(id) && !get("reveal").checked) {
      const veil = make("div", "veil");
      const button = make("button", "", "Show this text");
      button.type = "button";
      text.setAttribute("aria-hidden", "true");
      words.forEach((line) => { line.hidden = true; });
      button.addEventListener("click", () => {
        revealed.add(id);
        text.removeAttribute("aria-hidden");
        text.tabIndex = -1;
        words.forEach((line) => { line.hidden = false; });
        veil.replaceWith(text);
        text.focus();
      });
      veil.append(text, button);
      box.append(veil);
    } else {
      box.append(text);
    }
    const scores = make("ul", "scores");
    judges.forEach((judge, index) => {
      const score = answer.scores[index];
      const arrow = judge.better === "higher" ? " ↑ " : " ↓ ";
      scores.append(make("li", judge.audit ? "audit" : "", judge.name + arrow + (score === null ? "no valid score" : score)));
    });
    box.append(scores, ...words);
    return box;
  };

  const card = (prompt, index) => {
    const policy = policies[index];
    const box = make("article", policy.chosen ? "card chosen" : "card");
    const title = make("h4", "", policy.label);
    if (policy.chosen) title.append(make("span", "tag", "chosen"));
    if (policy.ratio === null) title.append(make("span", "tag", "baseline"));
    box.append(title);
    const answers = prompt.answers[index];
    if (!answers.length) box.append(make("p", "note", "No completion is stored."));
    answers.forEach((answer, place) =>
      box.append(answerView(answer, [prompt.id, index, place].join("/"), answers.length > 1)));
    return box;
  };

  // The policies beside the one at the slider: its neighbours, the sweep's ends, or one by its index.
  const companions = (place) => {
    const beside = get("beside").value;
    const places = beside === "near" ? [place - 1, place, place + 1] : [0, place, swept.length - 1];
    if (beside !== "near" && beside !== "ends") return [swept[place], Number(beside)];
    return [...new Set(places)].filter((at) => at in swept).sort((a, b) => a - b).map((at) => swept[at]);
  };
  const showPair = () => {
    const place = Number(get("ratio").value);
    const index = swept[place];
    get("ratio-text").textContent = policies[index].label;
    get("ratio").setAttribute("aria-valuetext", policies[index].label + (policies[index].chosen ? ", chosen" : ""));
    if (!current) return;
    const cards = companions(place).map((at) => {
      const box = card(current, at);
      if (at === index) box.classList.add("current");
      return box;
    });
    get("pair").replaceChildren(...cards);
  };
  const showAll = () => {
    const open = get("all-box").open && current;
    get("all").replaceChildren(...(open ? policies.map((policy, index) => card(current, index)) : []));
  };
  const show = (prompt) => {
    current = prompt;
    for (const button of get("prompts").querySelectorAll("button")) {
      button.setAttribute("aria-current", String(prompts[button.dataset.index] === prompt));
    }
    get("prompt").replaceChildren(...prompt.messages.map(([role, content]) => {
      const line = make("p");
      line.append(make("span", "role", role), content);
      return line;
    }));
    showPair();
    showAll();
  };

  const haystacks = prompts.map((prompt) =>
    [prompt.id, promptText(prompt), ...answersOf(prompt).map((answer) => answer.text)].join("\n").toLowerCase());
  const filter = () => {
    const category = get("category").value;
    const wanted = kinds[get("kind").value][1];
    const words = get("search").value.trim().toLowerCase();
    const found = prompts.map((prompt, index) => index).filter((index) =>
      (category === "" || "=" + prompts[index].category === category) && wanted(prompts[index]) &&
      haystacks[index].includes(words));
    get("prompts").replaceChildren(...found.map((index) => {
      const prompt = prompts[index];
      const text = lastUser(prompt).trim();
      const button = make("button", "", text.length > 140 ? text.slice(0, 140) + "…" : text);
      button.type = "button";
      button.dataset.index = index;
      button.append(make("small", "", prompt.id + (prompt.category ? ", " + prompt.category : "")));
      button.addEventListener("click", () => show(prompt));
      const item = make("li");
      item.append(button);
      return item;
    }));
    get("count").textContent = found.length + " of " + prompts.length + " prompts";
    if (found.length) show(prompts[found.includes(prompts.indexOf(current)) ? prompts.indexOf(current) : found[0]]);
  };

  const categories = [...new Set(prompts.map((prompt) => prompt.category))].sort();
  get("category").append(option("", "all"), ...categories.map((name) => option("=" + name, name || "(none)")));
  get("kind").append(...Object.entries(kinds).map(([key, [text, wanted]]) =>
    option(key, text + " (" + prompts.filter(wanted).length + ")")));
  get("beside").append(option("near", "its neighbours"), option("ends", "the two ends"),
    ...policies.map((policy, index) => option(index, policy.label)));
  get("ratio").max = swept.length - 1;
  get("ratio").value = chosen === undefined ? swept.length - 1 : swept.indexOf(chosen);
  get("beside").value = "near";
  for (const id of ["category", "kind"]) get(id).addEventListener("change", filter);
  get("search").addEventListener("input", filter);
  get("reveal").addEventListener("change", () => { showPair(); showAll(); });
  get("ratio").addEventListener("input", showPair);
  get("beside").addEventListener("change", showPair);
  get("all-box").addEventListener("toggle", showAll);
  get("viewer").hidden = false;
  current = prompts[data.first] || null;
  filter();
  const list = get("prompts");
  const first = list.querySelector("[aria-current=true]");
  psacpo.onPolicy((index) => {
    if (policies[index].ratio === null) get("beside").value = index;
    else get("ratio").value = swept.indexOf(index);
    showPair();
    get("completions").scrollIntoView();
    get("ratio").focus({ preventScroll: true });
  });
  if (first) list.scrollTop = first.getBoundingClientRect().top - list.getBoundingClientRect().top - 40;
})();
