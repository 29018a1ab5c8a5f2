/** Light or dark: as the system says, or as the person chose. */

const NAME = "lacre-page-theme";

export function theme() {
  const kept = localStorage.getItem(NAME);
  return kept === "light" || kept === "dark" ? kept : "system";
}

export function useTheme(chosen = theme()) {
  if (chosen === "system") localStorage.removeItem(NAME);
  else localStorage.setItem(NAME, chosen);
  document.documentElement.dataset.theme = chosen;
}
