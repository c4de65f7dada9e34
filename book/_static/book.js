// Three comforts; the page is complete without them. A formula keeps the comma after it and the bracket before it on its
// line, and a line that begins with ✓ wraps on a narrow screen. And paper is
// light.
document.addEventListener("DOMContentLoaded", () => {
  for (const math of document.querySelectorAll("article span.math")) {
    const before = math.previousSibling?.nodeType === 3 ? math.previousSibling.data.match(/[([“]$/)?.[0] : "";
    const after = math.nextSibling?.nodeType === 3 ? math.nextSibling.data.match(/^[.,;:!?)\]”’]+(-\w+)?/)?.[0] : "";
    if (!before && !after) continue;
    const joined = document.createElement("span");
    joined.className = "joined";
    if (before) math.previousSibling.data = math.previousSibling.data.slice(0, -1);
    if (after) math.nextSibling.data = math.nextSibling.data.slice(after.length);
    math.replaceWith(joined);
    joined.append(before || "", math, after || "");
  }
  for (const pre of document.querySelectorAll(".cell_output .output pre")) {
    if (!pre.textContent.includes("✓") || [...pre.children].some((child) => child.textContent)) continue;
    const lines = pre.textContent.replace(/\n$/, "").split("\n").map((line, i, all) => {
      if (!line.startsWith("✓")) return line + (i < all.length - 1 ? "\n" : "");
      const claim = document.createElement("span");
      claim.className = "claim";
      claim.textContent = line;
      const piece = document.createDocumentFragment();
      piece.append(claim, "\n");
      return piece;
    });
    pre.replaceChildren(...lines);
  }
});

let theme;
addEventListener("beforeprint", () => ((theme = document.documentElement.dataset.theme), (document.documentElement.dataset.theme = "light")));
addEventListener("afterprint", () => (document.documentElement.dataset.theme = theme));
