// Texts on the page that stand out from what is behind them by less than 4.5 to 1.
() => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, under) => top.slice(0, 3).map((one, i) => one * top[3] + under[i] * (1 - top[3]));
  const linear = (one) => one <= .03928 ? one / 12.92 : ((one + .055) / 1.055) ** 2.4;
  const light = (colour) => colour.reduce((sum, one, i) => sum + linear(one / 255) * [.2126, .7152, .0722][i], 0);
  const ground = (element) => {
    const above = [];
    for (let one = element; one; one = one.parentElement) above.push(parse(getComputedStyle(one).backgroundColor));
    return above.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const poor = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const isSeen = walker.currentNode.data.trim() && element.getClientRects().length;
    if (!isSeen || element.closest('[hidden], noscript, .skip, option')) continue;
    const style = getComputedStyle(element), under = ground(element);
    const colour = element.namespaceURI.endsWith('svg') ? style.fill : style.color;
    const [a, b] = [light(over(parse(colour), under)), light(under)].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) poor.add(`${element.tagName}.${element.className} ${colour} on ${under.map(Math.round)}: ${ratio}`);
  }
  return [...poor];
}
