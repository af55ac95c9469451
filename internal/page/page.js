// Keeps the page current: states, latencies, and rates in place of sums. Without
// it the page shows what was when it was loaded.
"use strict";
(() => {
  const version = document.body.dataset.version, said = document.getElementById("live");
  let before = null, failures = 0;
  const drawing = document.querySelector(".drawing")?.parentElement;
  if (drawing) drawing.scrollLeft = (drawing.scrollWidth - drawing.clientWidth) / 2; // this node, in the middle

  const size = (n) => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let i = 0;
    for (; n >= 1000 && i < units.length - 1; i++) n /= 1000;
    return (i === 0 ? Math.round(n) : n.toFixed(1)) + " " + units[i];
  };
  const set = (element, text) => { if (element && element.textContent !== text) element.textContent = text; };

  // rate is that of a counter since the last look; null where it is not known.
  const rate = (now, old, seconds, key) =>
    now[key] === null || !old || old[key] === null || now[key] < old[key] ? null : (now[key] - old[key]) / seconds;

  function show(now) {
    const seconds = before ? (now.at - before.at) / 1000 : 0;
    const old = new Map(before ? before.rows.map((r) => [r.id, r]) : []);
    const rates = new Map();
    set(document.getElementById("summary"), now.summary);
    for (const r of now.rows) {
      const row = document.getElementById(r.id);
      if (!row) continue;
      const cell = (name) => row.querySelector(`[data-cell=${name}]`);
      set(cell("rtt"), r.rtt);
      set(cell("heard"), r.heard);
      if (r.drops !== null) set(cell("drops"), String(r.drops));
      const key = cell("state").firstElementChild;
      key.className = "key " + r.state;
      set(key, r.state);
      if (seconds <= 0) continue;
      let sum = 0;
      for (const way of ["sent", "received"]) {
        const n = rate(r, old.get(r.id), seconds, way);
        if (n === null) continue;
        set(cell(way), size(n) + "/s");
        sum += n;
      }
      rates.set("m-" + r.id.slice(2), sum);
    }
    for (const m of now.marks) {
      const mark = document.querySelector(`[data-mark="${CSS.escape(m.id)}"]`), link = document.querySelector(`[data-link="${CSS.escape(m.id)}"]`);
      if (!mark) continue;
      mark.setAttribute("class", "mark " + m.state);
      link.setAttribute("class", "link " + m.state);
      const busy = rates.get(m.id) > 0 ? ", " + size(rates.get(m.id)) + "/s" : "";
      set(mark.querySelector(".middle"), m.label + (m.label ? busy : busy.slice(2)));
    }
    before = now;
  }

  async function poll() {
    try {
      const answer = await fetch("page.json" + location.search, { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      const now = await answer.json();
      if (now.version !== version) return location.reload();
      if (failures > 0) set(said, "");
      failures = 0;
      show(now);
    } catch {
      if (++failures === 2) set(said, "The daemon does not answer; this is what was last seen.");
    }
    setTimeout(poll, document.hidden ? 10000 : 2000);
  }
  poll();
})();
