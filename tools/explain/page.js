const tabs = [...document.querySelectorAll("[role=tab]")];
function show(tab) {
  document.body.className = "show-" + tab.dataset.when;
  for (const other of tabs) {
    other.setAttribute("aria-selected", other === tab);
    other.tabIndex = other === tab ? 0 : -1;
  }
}
for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const next = tabs[(i + 1) % tabs.length];
    show(next);
    next.focus();
  });
}
if (tabs.length) show(tabs[tabs.length - 1]);
