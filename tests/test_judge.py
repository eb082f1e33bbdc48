"""The judge on cases written by hand: what a regular expression gets wrong first, in both directions."""

from spark_ft.data.judge import IMPERIAL, METRIC, is_metric


def answers(block):
    return [answer.strip() for answer in block.split("|")]


METRIC_ONLY = answers(
    """
Bake at 180 °C for 20 minutes. | Bake at 180°C. | Bake at 180ºC. | About 180 degrees Celsius. |
Heat it to 74 degrees C, then rest it. | Use 250g flour. | Use 1.5 kg of potatoes. |
Half a litre of stock is plenty. | Add a litre of water. | Pour in two liters of water. |
Take 200 mL of milk. | Cut it 2 cm thick. | Roll to 3mm. | A 24-cm tin and 100 grams of butter. |
Stir in 5 dl of milk. | Weigh out ¾ kg of plums. | Freeze at −18 °C.
"""
)
# metric, with words that merely look imperial
METRIC_ONLY += answers(
    """
Bake the cupcakes at 170 °C. | With 30 ml of rum, serve it beside a cup of tea. |
Enjoy 20 g of chocolate with one cup of coffee. | Add a pinch of salt and 300 g of rice. |
Pound the garlic with 50 g of nuts. | Slice a pound cake into 2 cm slices. |
Inch the lid open and keep it at 90 °C. | Use a measuring cup marked to 200 ml. |
Give it 20 minutes, 250 ml of stock and a quarter of the onions. |
Add 2 tablespoons of oil and 1 teaspoon of salt to 400 g of beans. | Gas mark 4, which is 180 °C. |
Heat to 200 °C. For the filling, mix 90 g of nuts. | Bake 12 cupcakes with 100 g of butter. |
Stick to the recipe: two sticks of cinnamon in 500 ml of milk. | He said "bake at 200 °C for 30" and left.
"""
)
IMPERIAL_ONLY = answers(
    """
Bake at 350°F. | Bake at 350 F for 20 minutes. | Bake at 350 degrees Fahrenheit. | Bake at 350 degrees f. |
350℉ is right. | Use 2 cups of flour. | Use two cups flour. | Half a cup of sugar. | 1/2 cup sugar |
1½ cups of milk | A cup of rice feeds two. | 2-3 heaping cups of basil | Take 8 oz. of cheese. |
Take 8oz of cheese. | 16 fl oz of cream | 3 fluid ounces of lime juice | An ounce of yeast. |
Two pounds of beef. | 2 lbs potatoes | half a pound of bacon | a quarter pound of butter |
Cut them into 1-inch pieces. | half-inch slices | a few inches of water | a 9x13 inch pan | a 9" x 13" pan |
A quart of stock. | One stick of butter. | 2 sticks of unsalted butter
"""
)
BOTH = answers("Bake at 350°F (175 °C). | Use 1 cup (240 ml) of milk.")  # the reader still has to pick
NEITHER = answers(  # nor does a litre hide in "al"; and 180 degrees of what?
    """|
Cook it until it is done, about 20 minutes. | Set the oven to 180 degrees. | Two tablespoons of oil. |
Cook it al dente, am I right? | Vitamin C is lost in boiling. | Bake it at gas mark 6. |
Three eggs and a pinch of salt. | Plan C: order a pizza from 5G, the new place.
"""
)


def test_metric_answers_pass_others_fail_and_imperial_units_are_seen():
    found = {answer: (METRIC.search(answer), IMPERIAL.search(answer)) for answer in METRIC_ONLY}
    assert not {answer: units for answer, units in found.items() if not is_metric(answer)}
    others = IMPERIAL_ONLY + BOTH + NEITHER
    assert not {answer: METRIC.findall(answer) for answer in others if is_metric(answer)}
    assert not [answer for answer in IMPERIAL_ONLY + BOTH if not IMPERIAL.search(answer)]
