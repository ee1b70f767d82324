// Draws the plots and the heat map. Every text enters through textContent or an attribute's value, never as markup.
"use strict";
const psacpo = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const { policies, metrics } = data;
  const spec = Object.fromEntries(metrics.map((metric) => [metric.name, metric]));
  const listeners = [];

  const node = (tag, attributes = {}, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const html = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const minus = (text) => text.replace("-", "\u2212");
  const write = (value, decimals) => (value === null ? "–" : minus(value.toFixed(decimals)));
  const interval = (policy, name) => {
    const [mean, low, high] = policy.values[name];
    const digits = spec[name].decimals;
    const range = low === null || high === null ? "" : " [" + write(low, digits) + ", " + write(high, digits) + "]";
    return name + " " + write(mean, digits) + range;
  };

  // Round numbers that cover [low, high], about `wanted` of them.
  const ticks = (low, high, wanted) => {
    const rough = (high - low) / wanted;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.65);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const found = [];
    for (let at = Math.ceil(low / step); at * step <= high + step * 1e-9; at += 1) found.push((at * step).toFixed(digits));
    return found.map((text) => [Number(text), minus(Number(text) === 0 ? "0" : text)]);
  };
  // The ends of an axis: all values with room around, and a limit that is not far away.
  const bounds = (values, limits) => {
    let low = Math.min(...values);
    let high = Math.max(...values);
    const width = high - low || Math.abs(high) || 1;
    for (const limit of limits) {
      if (limit > low - width / 2 && limit < high + width / 2) [low, high] = [Math.min(low, limit), Math.max(high, limit)];
    }
    const room = (high - low || width) * 0.07;
    return [low - room, high + room];
  };
  const linear = ([low, high], from, to) => (value) => from + ((value - low) / (high - low)) * (to - from);

  // The frame of a plot: axes, ticks, titles; gives the drawing and the two scales.
  const frame = (box, height, xRange, yRange, xTitle, yTitle, label, xTicks) => {
    const width = Math.max(260, box.clientWidth);
    const left = 52, right = 12, top = 26, bottom = 44;
    const drawing = node("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label });
    const x = linear(xRange, left, width - right);
    const y = linear(yRange, height - bottom, top);
    const few = Math.max(3, Math.round((width - left - right) / 90));
    const marks = xTicks || ticks(...xRange, few);
    const end = x(marks[marks.length - 1][0]);
    let last = -Infinity;
    for (const [value, text] of marks) {
      drawing.append(node("line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: height - bottom }));
      const wide = text.length * 6 + 8;
      if (x(value) - last < wide || (x(value) !== end && end - x(value) < wide)) continue;
      last = x(value);
      drawing.append(node("text", { class: "tick", x: x(value), y: height - bottom + 16, "text-anchor": "middle" }, text));
    }
    for (const [value, text] of ticks(...yRange, 5)) {
      drawing.append(node("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
      drawing.append(node("text", { class: "tick", x: left - 7, y: y(value) + 4, "text-anchor": "end" }, text));
    }
    drawing.append(node("text", { class: "title", x: width - right, y: height - 8, "text-anchor": "end" }, xTitle));
    drawing.append(node("text", { class: "title", x: 4, y: 14 }, yTitle));
    return { drawing, x, y, width, height, left, right, top, bottom };
  };
  const better = (name, horizontal) => {
    const [up, down] = horizontal ? ["→", "←"] : ["↑", "↓"];
    return name + (spec[name].better === "higher" ? " (better " + up + ")" : " (better " + down + ")");
  };

  // A limit as a line, the side that breaks it shaded; `across` is whether it bounds the horizontal axis.
  const limit = (plot, constraint, across) => {
    const at = (across ? plot.x : plot.y)(constraint.limit);
    const [low, high] = across ? [plot.left, plot.width - plot.right] : [plot.top, plot.height - plot.bottom];
    const place = Math.min(Math.max(at, low), high);
    const after = (constraint.sense === "<=") === across;
    const [from, size] = after ? [place, high - place] : [low, place - low];
    const area = across
      ? { x: from, y: plot.top, width: size, height: plot.height - plot.bottom - plot.top }
      : { x: plot.left, y: from, width: plot.width - plot.right - plot.left, height: size };
    plot.drawing.append(node("rect", { class: "forbidden", ...area }));
    if (at >= low && at <= high) {
      const ends = across
        ? { x1: at, x2: at, y1: plot.top, y2: plot.height - plot.bottom }
        : { x1: plot.left, x2: plot.width - plot.right, y1: at, y2: at };
      plot.drawing.append(node("line", { class: "limit", ...ends }));
    }
    const text = constraint.text + (at >= low && at <= high ? "" : " (off the scale)");
    const where = across
      ? { x: Math.min(place + 4, plot.width - plot.right - text.length * 6), y: plot.height - plot.bottom - 6 }
      : { x: plot.left + 6, y: Math.max(place - 5, plot.top + 10) };
    plot.drawing.append(node("text", { class: "limit-text", ...where }, text));
  };

  // Puts each label beside its point where it covers the least.
  const labels = (plot, spots) => {
    const taken = spots.map(({ x, y }) => [x - 7, y - 7, x + 7, y + 7]);
    const covered = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
    const frameBox = [plot.left, plot.top, plot.width - plot.right, plot.height - plot.bottom];
    for (const spot of [...spots].sort((a, b) => Number(b.strong) - Number(a.strong))) {
      const wide = spot.text.length * (spot.strong ? 7.4 : 6.4) + 4;
      let best = null;
      for (const reach of [11, 20, 32, 46]) {
        for (const [dx, dy] of [[1, -1], [-1, -1], [1, 1], [-1, 1], [1, 0], [-1, 0], [0, -1], [0, 1]]) {
          const middle = [spot.x + dx * (reach - 2 + wide / 2), spot.y + dy * reach];
          const box = [middle[0] - wide / 2, middle[1] - 8, middle[0] + wide / 2, middle[1] + 8];
          const outside = wide * 16 - covered(box, frameBox);
          const cost = taken.reduce((sum, other) => sum + covered(box, other), 0) + outside * 4 + reach / 4;
          if (best === null || cost < best.cost) best = { cost, middle, box, reach };
        }
      }
      taken.push(best.box);
      if (best.reach > 25) plot.drawing.append(node("line", { class: "leader", x1: spot.x, y1: spot.y, x2: best.middle[0], y2: best.middle[1] }));
      const style = { class: "label" + (spot.strong ? " strong" : ""), x: best.middle[0], y: best.middle[1] + 4, "text-anchor": "middle" };
      plot.drawing.append(node("text", style, spot.text));
    }
  };

  // Points that tell their numbers on hover and focus; arrow keys go from one to the next, Enter shows its answers.
  const interactive = (box, plot, marks) => {
    const tip = html("div", "tip");
    tip.hidden = true;
    const show = (mark) => {
      tip.replaceChildren(html("b", "", mark.policy.label), ...mark.lines.map((line) => html("span", "", line)));
      tip.hidden = false;
      tip.style.left = Math.max(0, Math.min(mark.x + 12, plot.width - tip.offsetWidth - 4)) + "px";
      tip.style.top = Math.max(0, mark.y > plot.height / 2 ? mark.y - tip.offsetHeight - 12 : mark.y + 12) + "px";
    };
    const hide = () => { tip.hidden = true; };
    marks.forEach((mark, place) => {
      const { element } = mark;
      element.setAttribute("role", "button");
      element.setAttribute("aria-label", [mark.policy.label + (mark.policy.chosen ? " (chosen)" : ""), ...mark.lines].join(", "));
      element.setAttribute("tabindex", mark.policy.chosen || (place === 0 && !marks.some((other) => other.policy.chosen)) ? 0 : -1);
      element.addEventListener("mouseenter", () => show(mark));
      element.addEventListener("mouseleave", hide);
      element.addEventListener("focus", () => show(mark));
      element.addEventListener("blur", hide);
      const open = () => listeners.forEach((listener) => listener(policies.indexOf(mark.policy)));
      // A finger has no hover: its tap shows the numbers.
      element.addEventListener("click", (event) => (event.pointerType === "touch" ? show(mark) : open()));
      element.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") return hide();
        if (event.key === "Enter" || event.key === " ") open();
        else if (step === undefined && event.key !== "Home" && event.key !== "End") return;
        event.preventDefault();
        const next = event.key === "Home" ? 0 : event.key === "End" ? marks.length - 1 : place + (step || 0);
        if (next === place || !marks[next]) return;
        element.setAttribute("tabindex", -1);
        marks[next].element.setAttribute("tabindex", 0);
        marks[next].element.focus();
      });
    });
    box.replaceChildren(plot.drawing, tip);
  };

  const known = (policy, ...names) => names.every((name) => policy.values[name] && policy.values[name][0] !== null);
  const bar = (plot, x1, y1, x2, y2, kind) => plot.drawing.append(node("line", { class: "bar " + kind, x1, y1, x2, y2 }));
  const facts = (policy, names) => [
    ...names.map((name) => interval(policy, name)),
    ...(policy.p === null || policy.p === undefined ? [] : ["P(on frontier) " + policy.p.toFixed(2)]),
    ...(policy.dominated ? ["dominated by another " + data.dial.kind] : []),
    ...(policy.certified === true ? ["certified"] : policy.certified === false ? ["not certified"] : []),
  ];

  // One pair of metrics: the sweep as a path, intervals on both axes, limits, baselines.
  const scatter = (box, [vertical, horizontal], title, own) => {
    const shown = policies.filter((policy) => known(policy, horizontal, vertical));
    if (!shown.length) return box.replaceChildren(html("p", "note", "No policy has both numbers."));
    const limits = (name) => data.constraints.filter((constraint) => constraint.metric === name);
    const values = (name) => shown.flatMap((policy) => policy.values[name]).filter((value) => value !== null);
    const range = (name) => bounds(values(name), limits(name).map((constraint) => constraint.limit));
    const height = Math.max(300, Math.min(440, box.clientWidth * 0.75));
    const label = title + ": " + vertical + " against " + horizontal + ". Arrow keys go from policy to policy; the same numbers are in the table.";
    const plot = frame(box, height, range(horizontal), range(vertical), better(horizontal, true), better(vertical, false), label);
    limits(horizontal).forEach((constraint) => limit(plot, constraint, true));
    limits(vertical).forEach((constraint) => limit(plot, constraint, false));
    const at = (policy) => [plot.x(policy.values[horizontal][0]), plot.y(policy.values[vertical][0])];
    const path = shown.filter((policy) => policy.ratio !== null).map((policy) => at(policy).join(",")).join(" ");
    if (data.dial.path) plot.drawing.append(node("polyline", { class: "sweep", points: path }));
    for (const policy of shown) {
      const [x, y] = at(policy);
      const kind = policy.chosen ? "chosen" : policy.ratio === null ? "baseline" : "";
      const [, xLow, xHigh] = policy.values[horizontal];
      const [, yLow, yHigh] = policy.values[vertical];
      if (xLow !== null && xHigh !== null) bar(plot, plot.x(xLow), y, plot.x(xHigh), y, kind);
      if (yLow !== null && yHigh !== null) bar(plot, x, plot.y(yLow), x, plot.y(yHigh), kind);
    }
    const marks = shown.map((policy) => {
      const [x, y] = at(policy);
      const element = node("g", { class: "mark" + (policy.chosen ? " chosen" : "") });
      element.append(node("circle", { class: "reach", cx: x, cy: y, r: 12 }));
      if (policy.ratio === null) element.append(node("rect", { class: "baseline", x: x - 5, y: y - 5, width: 10, height: 10 }));
      else {
        const faint = own && policy.p !== null ? 0.35 + 0.65 * policy.p : 1;
        element.append(node("circle", { class: "under", cx: x, cy: y, r: 5.5 }));
        element.append(node("circle", { class: own && policy.dominated ? "hollow" : "point", cx: x, cy: y, r: 5.5, opacity: faint }));
      }
      if (policy.chosen) element.append(node("circle", { class: "ring", cx: x, cy: y, r: 9.5 }));
      return { element, policy, x, y, lines: facts(policy, [vertical, horizontal]) };
    });
    labels(plot, marks.map(({ policy, x, y }) => {
      const name = policy.ratio === null || (policy.chosen && data.dial.path) ? policy.label : policy.mark;
      return { x, y, strong: policy.chosen, text: name.length > 22 ? name.slice(0, 21) + "…" : name };
    }));
    plot.drawing.append(...marks.map((mark) => mark.element));
    interactive(box, plot, marks);
  };

  // One metric over the ratios, with its band, its limits, and the baselines as level lines.
  const curve = (box, name) => {
    const swept = policies.filter((policy) => policy.ratio !== null && known(policy, name));
    const levels = policies.filter((policy) => policy.ratio === null && known(policy, name));
    if (!swept.length) return box.replaceChildren(html("p", "note", "No ratio has this number."));
    const limits = data.constraints.filter((constraint) => constraint.metric === name);
    const values = [...swept.flatMap((policy) => policy.values[name]), ...levels.map((policy) => policy.values[name][0])];
    const [low, high] = bounds(values.filter((value) => value !== null), limits.map((constraint) => constraint.limit));
    const yRange = spec[name].rate ? [-0.02 * Math.max(high, 0.02), Math.min(1.03, Math.max(high, 0.02))] : [low, high];
    const ratios = swept.map((policy) => policy.ratio);
    const span = Math.max(...ratios) - Math.min(...ratios) || 1;
    const xRange = [Math.min(...ratios) - span * 0.03, Math.max(...ratios) + span * 0.03];
    const label = name + " by " + data.dial.kind + ". Arrow keys go from one to the next; the same numbers are in the table.";
    const marked = ratios.length <= 13 || !data.dial.path ? swept.map((policy) => [policy.ratio, policy.mark]) : null;
    const plot = frame(box, 300, xRange, yRange, data.dial.axis, better(name, false), label, marked);
    limits.forEach((constraint) => limit(plot, constraint, false));
    const point = (policy, place) => plot.x(policy.ratio) + "," + plot.y(policy.values[name][place] ?? policy.values[name][0]);
    const band = [...swept.map((policy) => point(policy, 2)), ...swept.map((policy) => point(policy, 1)).reverse()];
    plot.drawing.append(node("polygon", { class: "band", points: band.join(" ") }));
    const levelMarks = levels.map((policy) => {
      const y = plot.y(policy.values[name][0]);
      const element = node("g", { class: "mark" });
      element.append(node("line", { class: "level", x1: plot.left, x2: plot.width - plot.right, y1: y, y2: y }));
      element.append(node("rect", { class: "baseline", x: plot.width - plot.right - 10, y: y - 5, width: 10, height: 10 }));
      const short = policy.name.length > 22 ? policy.name.slice(0, 21) + "…" : policy.name;
      element.append(node("text", { class: "label", x: plot.width - plot.right - 14, y: y - 5, "text-anchor": "end" }, short));
      return { element, policy, x: plot.width - plot.right - 10, y, lines: [interval(policy, name)] };
    });
    plot.drawing.append(...levelMarks.map((mark) => mark.element));
    plot.drawing.append(node("polyline", { class: "line", points: swept.map((policy) => point(policy, 0)).join(" ") }));
    const marks = swept.map((policy) => {
      const x = plot.x(policy.ratio), y = plot.y(policy.values[name][0]);
      const element = node("g", { class: "mark" + (policy.chosen ? " chosen" : "") });
      element.append(node("circle", { class: "reach", cx: x, cy: y, r: 12 }), node("circle", { class: "point", cx: x, cy: y, r: 4.5 }));
      if (policy.chosen) element.append(node("circle", { class: "ring", cx: x, cy: y, r: 9 }));
      return { element, policy, x, y, lines: [interval(policy, name)] };
    });
    plot.drawing.append(...marks.map((mark) => mark.element));
    interactive(box, plot, [...marks, ...levelMarks]);
  };

  // Category by policy, each cell's number with a colour behind it: deeper is worse.
  const heat = (box, name) => {
    const rows = data.heat[name];
    get("heat-box").hidden = !rows;
    if (!rows) return;
    const means = rows.flatMap(([, cells]) => cells.filter(Boolean).map(([mean]) => mean));
    const low = spec[name].rate ? 0 : Math.min(...means);
    const high = Math.max(...means, low + 1e-12);
    const head = html("tr");
    head.append(html("th", "", "category"), ...policies.map((policy) => html("th", policy.chosen ? "chosen" : "", policy.label)));
    head.querySelectorAll("th").forEach((cell) => { cell.scope = "col"; });
    const lines = rows.map(([category, cells]) => {
      const line = html("tr");
      const count = Math.max(...cells.filter(Boolean).map(([, number]) => number));
      const first = html("th", "", category || "(none)");
      first.scope = "row";
      first.append(html("small", "", "n = " + count));
      line.append(first, ...cells.map((cell) => {
        const box = html("td", cell ? "heat" : "", cell ? write(cell[0], Math.min(spec[name].decimals, 3)) : "–");
        if (cell) {
          const share = (cell[0] - low) / (high - low);
          box.style.setProperty("--heat", Math.round(100 * (spec[name].better === "higher" ? 1 - share : share)) * 0.6 + "%");
          box.title = cell[1] + " answers";
        }
        return box;
      }));
      return line;
    });
    const table = html("table");
    const top = html("thead"), body = html("tbody");
    top.append(head);
    body.append(...lines);
    table.append(html("caption", "unseen", name + " by category; deeper colour is worse"), top, body);
    box.replaceChildren(table);
  };

  const draw = () => {
    data.axes.forEach((axes, place) => {
      const title = data.axes.length === 1 ? "Reward against cost" : place ? "Audit" : "By the judges";
      scatter(get("scatter-" + place), axes, title, place === 0);
    });
    curve(get("curve"), get("metric").value);
  };
  const choose = () => {
    const name = get("metric").value;
    get("meaning").textContent = spec[name].meaning + "; " + spec[name].better + " is better.";
    curve(get("curve"), name);
    heat(get("heat"), name);
  };
  const options = metrics.map((metric) => {
    const option = html("option", "", metric.name + (metric.better === "higher" ? " ↑" : " ↓") + (metric.audit ? " (audit)" : ""));
    option.value = metric.name;
    return option;
  });
  get("metric").append(...options);
  const wanted = data.constraints.map((constraint) => constraint.metric).find((name) => spec[name]);
  get("metric").value = wanted || data.axes[0][1];
  get("metric").addEventListener("change", choose);
  document.querySelectorAll("[data-plots]").forEach((part) => { part.hidden = false; });
  draw();
  choose();
  let width = document.documentElement.clientWidth;
  window.addEventListener("resize", () => {
    if (width === document.documentElement.clientWidth) return;
    width = document.documentElement.clientWidth;
    draw();
  });
  return { data, get, make: html, onPolicy: (listener) => listeners.push(listener) };
})();
